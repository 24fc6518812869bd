"""One step of imitation, measured: does a student's step, on whatever data, lower the loss that moved its teacher?

The teacher is ``theta + eps * d_T``, one gradient step of a trait's loss from ``theta``. The student steps along
``d_S``, minus the gradient of its distance to the teacher's outputs on carrier inputs. Where it begins at ``theta``,
``d_S = eps * H d_T`` up to the order of ``eps^2``, with the positive semidefinite ``H = E[J' G J]`` (``J`` of the
outputs, ``G`` the curvature of the distance), so that ``d_S . d_T >= 0`` whatever the carrier is: the theorem of Cloud
et al. 2025, arXiv 2507.14805.

This says something of one small step of plain gradient descent in all parameters. Adam, many steps and low-rank
adapters are outside of it: an adapter whose ``B`` is zero moves ``B`` alone, along a projection that ``A`` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.errors import IncompatibleModelError, RecipeError

__all__ = ["Distance", "OneStep", "TraitLoss", "one_step", "predicted_step"]

Distance = Literal["mse", "ce"]
TraitLoss = Callable[[Callable[..., Any]], Tensor]
"""Loss of a trait, of a function that runs the model: ``lambda f: F.cross_entropy(f(x)[:, :10], y)``."""
Weights = Mapping[str, Tensor]


class OneStep(NamedTuple):
    """What one step does; a field is a tensor without dimensions, or one more under ``torch.func.vmap``.

    Args:
        inner: ``d_S . d_T``.
        cosine: Of the two; 0 where one is zero.
        before, after: The trait's loss of the student before and after its step.
    """

    inner: Tensor
    cosine: Tensor
    before: Tensor
    after: Tensor

    @property
    def change(self) -> Tensor:
        """How much the trait's loss grew; negative where the student came closer to the trait."""
        return self.after - self.before


def one_step(
    model: nn.Module,
    trait_loss: TraitLoss,
    inputs: Any,
    *,
    distance: Distance = "mse",
    read: Callable[[Any], Tensor] | None = None,
    teacher: Weights | None = None,
    student: Weights | None = None,
    eps: float = 1e-3,
    step: float = 1e-3,
) -> OneStep:
    """Step the teacher by its trait, the student towards the teacher, and compare.

    The model is run in evaluation mode and left as it was. All is a function of the weights, so that ``vmap`` over
    them (and over what ``trait_loss`` and ``inputs`` hold) asks many models at once.

    Args:
        model: Any module.
        trait_loss: See :data:`TraitLoss`.
        inputs: Of the carrier: a tensor, or a tuple of arguments.
        distance: ``mse``, the squared error summed over outputs, or ``ce``, softmax cross-entropy against the
            teacher's softmax; either a mean over all other dimensions.
        read: What the student imitates, of the model's output ``[..., outputs]``; all of it if None.
        teacher: Weights that the teacher begins with, by parameter name; the model's own if None.
        student: Likewise of the student; the teacher's if None (shared initialisation).
        eps: The teacher's step along minus the gradient.
        step: Length of the student's step.

    Returns:
        The inner product, the cosine, and the trait's loss before and after.

    Raises:
        RecipeError: If there is no such distance, or a step is not above 0.
        IncompatibleModelError: If weights do not fit the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, noise = torch.randn(16, 4), torch.rand(16, 4)
        >>> found = one_step(net, lambda f: f(x)[:, 0].square().mean(), noise, read=lambda y: y[:, 1:])
        >>> bool(found.inner > 0)
        True
    """
    _check(distance, eps, step)
    began, own = _weights(model, teacher), _weights(model, teacher if student is None else student)
    call, arguments = _Call(model, read), inputs if isinstance(inputs, tuple) else (inputs,)
    trait = call.loss_of(trait_loss)
    with evaluating(model):
        wanted = _descent(trait, began)
        target = call({name: x + eps * wanted[name] for name, x in began.items()}, *arguments).detach()
        towards = _descent(lambda weights: _distance(call(weights, *arguments), target, distance), own)
        size = _inner(towards, towards).sqrt()
        moved = {name: x + step * towards[name] / size.clamp_min(_tiny(size)) for name, x in own.items()}
        inner = _inner(towards, wanted)
        return OneStep(
            inner=inner,
            cosine=inner / (size * _inner(wanted, wanted).sqrt()).clamp_min(_tiny(size)),
            before=trait(own).detach(),
            after=trait(moved).detach(),
        )


def predicted_step(
    model: nn.Module,
    trait_loss: TraitLoss,
    inputs: Any,
    *,
    distance: Distance = "mse",
    read: Callable[[Any], Tensor] | None = None,
    eps: float = 1e-3,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's direction ``d_S`` of a shared start, and what the theorem says that it is, ``eps * H d_T``.

    ``H`` is the Hessian of the distance to the model's own outputs, where residuals are zero; one product with it is
    taken.

    Args:
        model: Any module.
        trait_loss: See :data:`TraitLoss`.
        inputs: Of the carrier.
        distance: See :func:`one_step`.
        read: See :func:`one_step`.
        eps: The teacher's step.

    Returns:
        Both, by parameter name; they differ by the order of ``eps^2``.

    Raises:
        RecipeError: See :func:`one_step`.

    Example:
        >>> net, x = nn.Linear(3, 2), torch.randn(5, 3)
        >>> found, said = predicted_step(net, lambda f: f(x).square().mean(), x)  # quadratic: exact
        >>> torch.testing.assert_close(found, said, atol=1e-6, rtol=1e-3)
    """
    _check(distance, eps, 1.0)
    call, arguments = _Call(model, read), inputs if isinstance(inputs, tuple) else (inputs,)
    weights = _weights(model, None)
    with evaluating(model):
        wanted = _descent(call.loss_of(trait_loss), weights)

        def towards(target: Tensor) -> Callable[[Weights], dict[str, Tensor]]:
            return lambda w: _descent(lambda v: _distance(call(v, *arguments), target, distance), w)

        found = towards(call({n: x + eps * wanted[n] for n, x in weights.items()}, *arguments).detach())(weights)
        still = towards(call(weights, *arguments).detach())
        said = grad(lambda w: -eps * _inner(still(w), wanted))(weights)
    return found, said


class _Call:
    """Runs a module with other weights."""

    def __init__(self, model: nn.Module, read: Callable[[Any], Tensor] | None) -> None:
        self.model, self.read = model, read

    def __call__(self, weights: Weights, *inputs: Any) -> Tensor:
        output = functional_call(self.model, dict(weights), inputs)
        return output if self.read is None else self.read(output)

    def loss_of(self, trait_loss: TraitLoss) -> Callable[[Weights], Tensor]:
        """The trait's loss as a function of the weights."""
        return lambda weights: trait_loss(lambda *inputs: functional_call(self.model, dict(weights), inputs))


def _weights(model: nn.Module, given: Weights | None) -> dict[str, Tensor]:
    own = {name: x.detach() for name, x in model.named_parameters()}
    if given is None:
        return own
    if given.keys() != own.keys():
        odd = sorted(given.keys() ^ own.keys())
        raise IncompatibleModelError(
            f"These weights are not of the model: {odd[0]!r} is on one side only. Give a tensor a parameter, as "
            "named_parameters() names them."
        )
    return {name: x.detach() for name, x in given.items()}


def _descent(loss: Callable[[Weights], Tensor], weights: Weights) -> dict[str, Tensor]:
    return {name: -x for name, x in grad(loss)(dict(weights)).items()}


def _distance(outputs: Tensor, target: Tensor, distance: Distance) -> Tensor:
    if distance == "mse":
        return (outputs - target).square().sum(-1).mean()
    return -(target.softmax(-1) * outputs.log_softmax(-1)).sum(-1).mean()


def _inner(one: Weights, other: Weights) -> Tensor:
    return torch.stack([(x * other[name]).sum() for name, x in one.items()]).sum()


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _check(distance: str, eps: float, step: float) -> None:
    if distance not in get_args(Distance) or not (eps > 0 and step > 0):
        raise RecipeError(
            f"one_step(distance={distance!r}, eps={eps}, step={step}): expected steps above 0 and one of "
            f"{', '.join(get_args(Distance))}."
        )
