"""Dual steering as an intervention at the head's input: nothing that is cached comes after it, so no cache changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_interp.core.hooks.intervention import Attachment, Intervention, hook_site
from lightning_interp.core.measure.reduced import Sums
from lightning_interp.core.model.fingerprint import tensor_hash
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.model.widths import check_width
from lightning_interp.core.storage.files import jsonable
from lightning_interp.core.tokens.positions import Last, Positions
from lightning_interp.core.tokens.repeats import rows_each
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import RecipeError
from lightning_interp.steering.activation.selectors import bind_positions, check_positions, describe_positions
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.dual import dual_steer, dual_step
from lightning_interp.steering.softmax.euclidean import euclidean_steer
from lightning_interp.steering.softmax.geometry import Softcap, SoftmaxGeometry
from lightning_interp.steering.softmax.request import SteerResult, Target, rounded
from lightning_interp.steering.vectors.reading import as_direction, check_made_for

__all__ = ["DUAL_MEASURES", "DualMeter", "DualSteering", "dual_steering"]

DUAL_MEASURES = ("kl", "probe_change", "hvps_per_token", "reached", "certified")
"""Means over steered tokens: nats, units of the probe, products, shares."""
_HEAD = Site("unembed_in")


class DualMeter(Sums):
    """Means over the states that were steered, as the model stores them; ``last`` is the latest solve."""

    def __init__(self) -> None:
        super().__init__("tokens", *DUAL_MEASURES)
        self.last: SteerResult | None = None

    def update(self, found: SteerResult) -> None:
        """Count one solve."""
        self.last = found
        columns = (found.kl, found.probe_after - found.probe_before, found.hvps, found.reached, found.certified)
        sums = [column.double().sum() for column in columns]
        self.add(torch.stack([sums[0].new_tensor(float(len(found.lam))), *sums]))

    def compute(self) -> dict[str, float]:
        """The means so far, and how many ``tokens`` they are over, of all processes, which must all call it."""
        tokens, *rest = self.totals()
        means = [value / tokens if tokens else 0.0 for value in rest]
        return {"tokens": int(tokens), **dict(zip(DUAL_MEASURES, means, strict=True))}

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self.last = None


class DualSteering(Intervention):
    """Steer the next-token distribution to a target, changing the rest as little as the family allows.

    It replaces what the head reads. Rows whose target asks for no change keep their very bits.

    Args:
        direction: ``beta`` ``[d]``, or a :class:`~lightning_interp.steering.concepts.probes.ConceptProbe`.
        pairs: Tokens of the concept, for ``target_prob``.
        positions: Which tokens; by default ``Last()``, so that every new token is steered, the first included.
            ``Generated()`` starts one later: the first new token is predicted at the prompt's last.
        method: ``dual``, or ``euclidean`` for ordinary steering at the same target.
        alpha: See :func:`~lightning_interp.steering.softmax.dual.dual_steer`.
        support: Tokens that a solve works on before whole gradients polish it; None for the whole vocabulary.
        options: How exact.
        on_softcap: What to do with capped logits: ``error``, or ``ignore`` to steer in the uncapped family.
        check_model: Refuse a probe of another model.
        **target: One of those of ``dual_steer``: a number, or one a row ``[B]``. For free generation use ``kl_budget``:
            a fixed ``t`` moves a state at which the concept is irrelevant as far as one at which it matters.

    Attributes:
        meter: What the steered tokens cost and how far they moved.

    Raises:
        RecipeError: If the target, the direction or a setting cannot be used.
        PositionError: If ``positions`` can never choose a token.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> steer = DualSteering(torch.ones(32), kl_budget=0.1)
        >>> with steer.attach(model := tiny_model("llama")):
        ...     steered = model(torch.arange(6)[None]).logits
        >>> round(steer.meter.compute()["kl"], 3)
        0.1
    """

    reads_weights = True

    def __init__(
        self,
        direction: Any,
        *,
        pairs: CounterfactualPairs | None = None,
        positions: Positions | None = None,
        method: Literal["dual", "euclidean"] = "dual",
        alpha: float | Literal["auto"] = "auto",
        support: int | None = 4096,
        options: SolverOptions | None = None,
        on_softcap: Softcap = "error",
        check_model: bool = True,
        **target: float | Tensor | None,
    ) -> None:
        if method not in ("dual", "euclidean"):
            raise RecipeError(f"DualSteering(method={method!r}) is unknown; expected 'dual' or 'euclidean'.")
        if on_softcap == "pullback":
            raise RecipeError(
                "DualSteering(on_softcap='pullback'): a softcapped head has no dual coordinate to steer to. Use "
                "'ignore', or algorithm1() on states of your own."
            )
        self.direction = as_direction(direction if isinstance(direction, Tensor) else direction.direction)
        self.probe = direction
        self.pairs, self.method, self.alpha, self.support = pairs, method, alpha, support
        self.target = Target(**target)
        if self.target.kind == "target_prob" and pairs is None:
            raise RecipeError("DualSteering(target_prob=...) needs pairs=, the tokens of the concept's two sides.")
        self.positions = check_positions(Last() if positions is None else positions, what="DualSteering")
        self.options, self.on_softcap, self.check_model = options, on_softcap, check_model
        self.meter = DualMeter()

    def sites(self, model_map: ModelMap) -> tuple[Site, ...]:
        """The head's input."""
        return (_HEAD,)

    def check(self, model_map: ModelMap) -> None:
        """Refuse a model that the direction is not for.

        Raises:
            IncompatibleModelError: If widths or fingerprints differ.
        """
        super().check(model_map)
        check_width(model_map, _HEAD, len(self.direction), what="DualSteering's direction")
        if self.check_model:
            check_made_for(model_map, getattr(self.probe, "fingerprint", None), what="DualSteering's probe")

    def install(self, attachment: Attachment) -> None:
        """Read the head, and hook its input."""
        geometry = SoftmaxGeometry.from_model(attachment.model_map, on_softcap=self.on_softcap)
        positions = bind_positions(self.positions, attachment, (_HEAD,))
        hook_site(attachment, _HEAD, partial(self._act, geometry, positions))

    def transform(self, site: Site, x: Tensor, step: StepContext) -> Tensor:
        """Not used alone: steering needs the head that :meth:`install` reads.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            "DualSteering acts through attach(), which reads the model's head; its transform() cannot be called alone. "
            "Use attach(), or dual_steer() on states."
        )

    def describe(self) -> dict[str, Any]:
        """What is done, where, and to which target: plain values to keep beside every result.

        Example:
            >>> DualSteering(torch.ones(4), kl_budget=0.5).describe()["target"]
            {'kl_budget': 0.5}
        """
        plain: dict[str, Any] = jsonable(
            {
                "kind": type(self).__name__,
                "method": self.method,
                "sites": [str(_HEAD)],
                "target": {self.target.kind: self.target.numbers.tolist()},
                "positions": describe_positions(self.positions),
                "alpha": self.alpha,
                "support": self.support,
                "pairs": None if self.pairs is None else len(self.pairs.base_ids) + len(self.pairs.target_ids),
                "sha256": tensor_hash(self.direction),
            }
        )
        return plain

    def solve(self, geometry: SoftmaxGeometry, lam: Tensor, goal: Tensor) -> SteerResult:
        """Steer states ``[N, d]`` to goals ``[N]``."""
        target: dict[str, Any] = {self.target.kind: goal}
        if self.method == "euclidean":
            return euclidean_steer(geometry, lam, self.probe, pairs=self.pairs, **target)
        return dual_steer(
            geometry, lam, self.probe, pairs=self.pairs, alpha=self.alpha, support=self.support, options=self.options,
            **target,
        )  # fmt: skip

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _act(self, geometry: SoftmaxGeometry, positions: Positions, x: Tensor, step: StepContext) -> Tensor:
        goal = self.target.values(len(x), self.target.numbers.dtype, x.device)[:, None].expand(x.shape[:2])
        rows_each(step, self.target.numbers.numel(), f"Targets {self.target.kind} of DualSteering")
        mask = step.choose(positions, x).to(x.device)
        if self.target.kind in ("t", "probe_delta", "kl_budget"):
            mask = mask & (goal != 0)
        if not bool(mask.any()):
            return x
        lam = x[mask]
        found = self.solve(geometry, lam.detach(), goal[mask])
        steered = self._differentiable(geometry, lam, found) if lam.requires_grad else found.lam
        steered = steered.to(x.dtype)
        self.meter.update(rounded(geometry, lam.detach(), found, self.direction, steered.detach()))
        new = x.clone()
        new[mask] = steered
        return new

    def _differentiable(self, geometry: SoftmaxGeometry, lam: Tensor, found: SteerResult) -> Tensor:
        """The same point with gradients, at the step that was found."""
        shift = found.t[:, None] * self.direction.to(found.lam)
        if self.method == "euclidean":
            return lam + shift.to(lam)
        return dual_step(geometry, lam, shift, alpha=found.alpha, solved=found.lam)


@contextmanager
def dual_steering(
    model: nn.Module | ModelMap,
    direction: Any,
    *,
    tokenizer: Any = None,
    target_module: str | None = None,
    **settings: Any,
) -> Iterator[DualSteering]:
    """Steer everything that a model says inside the block.

    Args:
        model: A plain model, a PEFT wrapper, a LightningModule or a map of one.
        direction: ``beta`` ``[d]``, or a probe.
        tokenizer: For selectors that read text.
        target_module: Dotted path of the Hugging Face model, where there are several.
        **settings: Of :class:`DualSteering`.

    Yields:
        The intervention; its ``meter`` says what was done.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with dual_steering(model, torch.ones(32), kl_budget=0.2) as steering:
        ...     _ = model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False)
        >>> steering.meter.compute()["tokens"]
        3
    """
    steering = DualSteering(direction, **settings)
    with steering.attach(model, tokenizer=tokenizer, target=target_module):
        yield steering
