"""The information geometry of the softmax: dual coordinates, Hessian-vector products, divergences, geodesics.

At the last hidden state ``lam`` a language model's next-token distribution is an exponential family,
``p(y) = exp(lam . g_y - A(lam))``. Everything here follows from its log-normaliser ``A`` (Park, Nief, Choe, Veitch,
*The Information Geometry of Softmax*, arXiv 2602.15293, sections 1 and 2).
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_interp.core.model.head import SoftmaxHead, read_head
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.masked_linear import MaskedHooks
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.steering.softmax.arithmetic import centred, divergence, entropy, exact_arithmetic, working_dtype
from lightning_interp.steering.softmax.newton import REASONS, NewtonResult, Potential, minimise

__all__ = ["Softcap", "SoftmaxGeometry"]

Softcap = Literal["error", "ignore", "pullback"]
_CHUNK_BYTES = 2**28
_LADDER = tuple(2.0**k for k in range(12, -1, -1))


class SoftmaxGeometry:
    """The next-token family of one head, and maps between its two coordinate systems.

    All methods take states ``[..., d]`` in any floating dtype and work in float32 (float64 if the state or the weight
    is), without autocast. The weight is not copied while it has the working dtype.

    Args:
        weight: Unembedding ``G`` ``[V, d]``.
        bias: ``[V]`` or None; a base measure, which changes nothing of the theory.
        scale: Factor of all logits.
        softcap: ``s`` of ``s tanh(z / s)``, or None. A softcapped head is no exponential family.
        on_softcap: ``error`` refuses one, ``ignore`` works in the uncapped family, ``pullback`` gives only :meth:`hvp`
            (the Fisher matrix of the capped distribution), for the stepwise path.
        name: For messages.

    Raises:
        IncompatibleModelError: If shapes do not fit, a value is not finite, or a softcap is refused.

    Example:
        >>> geometry = SoftmaxGeometry(torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.5, -1.0]]))
        >>> lam = torch.tensor([0.3, -0.2])
        >>> torch.allclose(geometry.inverse_dual(geometry.dual(lam), alpha=0.0), lam, atol=1e-4)
        True
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        on_softcap: Softcap = "error",
        name: str = "head",
    ) -> None:
        _check_head(weight, bias)
        if softcap is not None and on_softcap == "error":
            raise IncompatibleModelError(
                f"{name} caps its logits at {softcap:g}, so it is no exponential family and dual steering has no "
                "guarantee. Pass on_softcap='ignore' (work in the uncapped family) or 'pullback' (stepwise only)."
            )
        self.weight, self.bias, self.scale = weight.detach(), None if bias is None else bias.detach(), float(scale)
        self.softcap, self.on_softcap, self.name = softcap, on_softcap, name
        self._copies: dict[tuple[torch.dtype, torch.device], tuple[int, Tensor]] = {}

    @classmethod
    def from_model(
        cls, model: nn.Module | ModelMap, *, on_softcap: Softcap = "error", vocab_size: int | None = None
    ) -> SoftmaxGeometry:
        """The geometry of a model's head, checked against the model's own logits.

        Args:
            model: A plain model, a PEFT wrapper, a LightningModule or a map of one.
            on_softcap: What to do with capped logits; see the class.
            vocab_size: Cut padding rows off the vocabulary; by default the model's own softmax, with them.

        Returns:
            The geometry.

        Raises:
            IncompatibleModelError: If the logits are no function of the head's input that this geometry knows.
            SiteError: If the model has no head.
        """
        model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
        if model_map.head is not None and MaskedHooks.on(model_map.head) is not None:
            raise IncompatibleModelError(
                f"The unembedding of {type(model_map.model).__name__} takes its weights row by row from what is "
                "attached, so there is no one softmax family. Leave 'unembed' out of the graft, or remove it first."
            )
        return cls.from_head(read_head(model_map), on_softcap=on_softcap, vocab_size=vocab_size)

    @classmethod
    def from_head(
        cls, head: SoftmaxHead, *, on_softcap: Softcap = "error", vocab_size: int | None = None
    ) -> SoftmaxGeometry:
        """The geometry of a head that ``read_head`` read before."""
        size = len(head.weight) if vocab_size is None else vocab_size
        if not 0 < size <= len(head.weight):
            raise IncompatibleModelError(f"vocab_size={vocab_size}: {head.name} has {len(head.weight)} rows.")
        bias = None if head.bias is None else head.bias[:size]
        return cls(
            head.weight[:size], bias, scale=head.scale, softcap=head.softcap, on_softcap=on_softcap, name=head.name
        )

    @property
    def vocabulary(self) -> int:
        """Rows ``V``."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Columns ``d``."""
        return self.weight.shape[1]

    @cached_property
    def spread(self) -> float:
        """Mean variance of the logits' gradients over the vocabulary, ``trace(Cov_uniform[g]) / d``; 0 if all equal."""
        rows = self.weight.to(torch.float32)
        found, rounded = rows.var(dim=0, correction=0).mean(), torch.finfo(torch.float32).eps * rows.norm(p=torch.inf)
        return float(found) * self.scale**2 if bool(found > rounded**2) else 0.0

    def resolve_alpha(self, alpha: float | Literal["auto"], *, kappa: float = 5.0) -> float:
        """A number for ``alpha="auto"``: ``kappa`` times :attr:`spread`.

        ``alpha`` is not scale free: multiplying the unembedding by ``s`` asks for ``s^2 alpha``. ``kappa`` is this
        package's choice, not the paper's: a tenth of it lets SmolLM2-135M move in what no likely token feels.

        Raises:
            IncompatibleModelError: If all rows of the unembedding are equal.
        """
        if alpha != "auto":
            return float(alpha)
        if self.spread == 0:
            raise IncompatibleModelError(
                f"alpha='auto' with {self.name}: all {self.vocabulary} rows of the unembedding are equal, so no state "
                "makes one token likelier than another. Look at the checkpoint's lm_head, or pass alpha > 0."
            )
        return kappa * self.spread

    def check_state(self, *tensors: Tensor) -> None:
        """Refuse states or directions of another width.

        Raises:
            IncompatibleModelError: With both widths.
        """
        for tensor in tensors:
            if tensor.shape[-1:] != (self.width,):
                raise IncompatibleModelError(
                    f"{self.name} reads states of width {self.width}, but got {list(tensor.shape)}. Use a state or "
                    "direction of this model's head input."
                )

    def logits(self, lam: Tensor) -> Tensor:
        """Logits of the family ``[..., V]`` (uncapped, if capping is ignored)."""
        z = self.logits_change(lam)
        return z if self.bias is None else z + self.scale * self.bias.to(z)

    def logits_change(self, v: Tensor) -> Tensor:
        """How far the logits move when the state moves by ``v``, ``[..., V]``."""
        self.check_state(v)
        with exact_arithmetic(v.device):
            return self.scale * (v.to(self._dtype(v)) @ self._rows(v).T)

    def mean(self, weights: Tensor) -> Tensor:
        """Weighted sum of the logits' gradients, ``[..., V] -> [..., d]``."""
        with exact_arithmetic(weights.device):
            return self.scale * (weights @ self._rows(weights))

    def gradients(self, index: Tensor) -> Tensor:
        """Gradients of the logits of some tokens, ``[...] -> [..., d]``."""
        return self.scale * self.weight[index].to(self._dtype())

    def log_probs(self, lam: Tensor) -> Tensor:
        """Log-probabilities of the family, ``[..., V]``."""
        return self.logits(lam).log_softmax(-1)

    def probs(self, lam: Tensor) -> Tensor:
        """Probabilities of the family, ``[..., V]``."""
        return self.logits(lam).softmax(-1)

    def model_log_probs(self, lam: Tensor) -> Tensor:
        """Log-probabilities that the model itself gives, capped where it caps, ``[..., V]``."""
        return self.capped(self.logits(lam)).log_softmax(-1)

    def capped(self, z: Tensor) -> Tensor:
        """The model's logits from the family's, which are the same unless it caps them, ``[..., V]``."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def log_norm(self, lam: Tensor) -> Tensor:
        """Log-normaliser ``A(lam)``, ``[...]``."""
        return self.logits(lam).logsumexp(-1)

    def dual(self, lam: Tensor, *, alpha: float = 0.0) -> Tensor:
        """Dual coordinate ``grad A = E[g]`` ``[..., d]`` (section 2 of the paper), plus ``alpha lam``."""
        self._need_family("dual()")
        flat = lam.reshape(-1, lam.shape[-1])
        found = torch.cat([self.mean(self.probs(part)) for part in torch.split(flat, self.max_rows)])
        return found.reshape(lam.shape) + alpha * lam.to(found)

    def hvp(self, lam: Tensor, v: Tensor) -> Tensor:
        """Fisher information at a state times a vector, ``Cov[g] v`` ``[..., d]``; of a capped head pulled back."""
        self.check_state(lam, v)
        p, v = self._fisher_weights(lam), v.to(self._dtype(lam, v))
        if self.on_softcap == "pullback" and self.softcap is not None:
            slope = 1 - torch.tanh(self.logits(lam) / self.softcap).square()
            return self.mean(slope * centred(p, slope * self.logits_change(v)))
        return self.mean(centred(p, self.logits_change(v)))

    def fisher_norm(self, lam: Tensor, v: Tensor) -> Tensor:
        """Length of ``v`` in the Fisher metric at ``lam``, ``[...]``."""
        p, u = self._fisher_weights(lam), self.logits_change(v.to(self._dtype(lam, v)))
        if self.on_softcap == "pullback" and self.softcap is not None:
            u = u * (1 - torch.tanh(self.logits(lam) / self.softcap).square())
        return (centred(p, u) * u).sum(-1).clamp_min(0).sqrt()

    def kl(self, lam0: Tensor, lam1: Tensor) -> Tensor:
        """``KL(P_lam0 || P_lam1)`` in nats of the model's own (capped) distributions, ``[...]``."""
        first, second = (lam.to(self._dtype(lam0, lam1)) for lam in (lam0, lam1))
        return self.kl_of_move(self.logits(first), self.logits(second), self.logits_change(second - first))

    def kl_of_move(self, z0: Tensor, z1: Tensor, change: Tensor) -> Tensor:
        """:meth:`kl` from the family's logits at both ends and their difference, which is exact as an argument."""
        if self.softcap is not None:  # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
            share = 1 - torch.tanh(z0 / self.softcap) * torch.tanh(z1 / self.softcap)
            change = self.softcap * torch.tanh(change / self.softcap) * share
        return divergence(self.capped(z0).log_softmax(-1), change)

    def entropy(self, lam: Tensor) -> Tensor:
        """Entropy of the model's own distribution in nats, ``[...]``."""
        return entropy(self.model_log_probs(lam))

    def inverse_dual(
        self, y: Tensor, *, alpha: float = 0.0, start: Tensor | None = None, rtol: float | None = None
    ) -> Tensor:
        """The state whose dual coordinate ``dual(lam, alpha=alpha)`` is ``y``, ``[..., d]``.

        With ``alpha > 0`` each ``y`` has exactly one, with 0 only inside the convex hull of the unembedding's rows.

        Args:
            y: Regularised dual coordinates ``[..., d]``.
            alpha: The regularisation that ``y`` was made with.
            start: First guess ``[..., d]``; the origin if None.
            rtol: Accepted error relative to ``y``; by default 1e-5 in float32 and 1e-12 in float64.

        Returns:
            The states.

        Raises:
            IncompatibleModelError: If a point could not be reached, such as one outside of the hull.
        """
        found = self.solve_dual(y, alpha=alpha, start=start, rtol=rtol)
        if not bool(found.converged.all()):
            worst = int(found.residual.argmax())
            raise IncompatibleModelError(
                f"inverse_dual(alpha={alpha:g}) of {self.name} left a residual of {float(found.residual[worst]):.2g} "
                f"in row {worst} ({found.reasons()[worst]}). With alpha=0 a point must lie inside the hull of the "
                "unembedding's rows; use alpha > 0."
            )
        return found.lam.reshape(y.shape)

    def solve_dual(
        self, y: Tensor, *, alpha: float = 0.0, start: Tensor | None = None, rtol: float | None = None
    ) -> NewtonResult:
        """:meth:`inverse_dual` with its diagnostics, and without the error; rows are flattened to ``[N, d]``."""
        self._need_family("inverse_dual()")
        self.check_state(y)
        flat = y.reshape(-1, self.width).to(self._dtype(y))
        first = torch.zeros_like(flat) if start is None else start.reshape(flat.shape).to(flat)
        accepted = rtol if rtol is not None else (1e-12 if flat.dtype == torch.float64 else 1e-5)
        size = flat.norm(dim=-1).clamp_min(torch.finfo(flat.dtype).tiny)
        found = self._solve(flat, first, alpha, accepted * size)
        if alpha > 0 and not bool(found.converged.all()):
            # Far outside of the hull the potential is nearly made of planes. There the state grows like 1 / alpha, so
            # it is followed from a larger alpha down.
            rows = (~found.converged).nonzero().flatten()
            guess, wanted = torch.zeros_like(flat[rows]), (accepted * size)[rows]
            for factor in _LADDER:
                again = self._solve(flat[rows], guess, factor * alpha, wanted)
                guess = again.lam * _LADDER[0] / _LADDER[1]
            found.put(rows, again, torch.arange(len(rows), device=rows.device))
        return self._judged(found, flat, alpha, accepted * size)

    def _judged(self, found: NewtonResult, y: Tensor, alpha: float, accepted: Tensor) -> NewtonResult:
        """Residuals of the states that are returned, and no convergence where they are too large."""
        found.residual = (self.dual(found.lam, alpha=alpha) - y).norm(dim=-1)
        rounded = 64 * torch.finfo(y.dtype).eps * (y.norm(dim=-1) + alpha * found.lam.norm(dim=-1))
        wrong = found.converged & ~(found.residual <= 10 * torch.maximum(accepted, rounded))
        found.reason = torch.where(wrong, REASONS.index("stalled"), found.reason)
        return found

    def _solve(self, y: Tensor, start: Tensor, alpha: float, accepted: Tensor) -> NewtonResult:
        potential = Potential(self, linear=y, centre=torch.zeros_like(y), alpha=alpha)
        return minimise(potential, start, tolerance=accepted, max_newton=100, cg_max=4 * self.width + 20)

    def e_geodesic(self, lam0: Tensor, lam1: Tensor, t: float) -> Tensor:
        """Straight line in the state: keeps what both ends share (paper 2.2)."""
        return (1 - t) * lam0 + t * lam1

    def m_geodesic(self, lam0: Tensor, lam1: Tensor, t: float, *, alpha: float = 0.0) -> Tensor:
        """Straight line in the dual coordinate: matches the moments of the two ends' mixture (paper 2.2)."""
        y = (1 - t) * self.dual(lam0, alpha=alpha) + t * self.dual(lam1, alpha=alpha)
        return self.inverse_dual(y, alpha=alpha, start=self.e_geodesic(lam0, lam1, t))

    @property
    def max_rows(self) -> int:
        """States that are worked on at a time, so that ``[rows, V]`` buffers stay small."""
        return max(1, _CHUNK_BYTES // (8 * self.vocabulary))

    def _dtype(self, *tensors: Tensor) -> torch.dtype:
        return working_dtype(self.weight, *tensors)

    def _rows(self, like: Tensor) -> Tensor:
        """The weight in the working dtype; a converted copy is kept until the weight changes."""
        key = (self._dtype(like), like.device)
        if key == (self.weight.dtype, self.weight.device):
            return self.weight
        version, copy = self._copies.get(key, (-1, self.weight))
        if version != self.weight._version:
            copy = self.weight.to(dtype=key[0], device=key[1])
            self._copies[key] = (self.weight._version, copy)
        return copy

    def _fisher_weights(self, lam: Tensor) -> Tensor:
        return self.model_log_probs(lam).exp() if self.on_softcap == "pullback" else self.probs(lam)

    def _need_family(self, what: str) -> None:
        if self.softcap is not None and self.on_softcap == "pullback":
            raise IncompatibleModelError(
                f"{what} of {self.name}, which caps its logits at {self.softcap:g}: a capped head has no dual "
                "coordinate. Use on_softcap='ignore', or the stepwise path (algorithm1)."
            )


def _check_head(weight: Tensor, bias: Tensor | None) -> None:
    problem = None
    if weight.dim() != 2 or not weight.is_floating_point():
        problem = f"a weight of {weight.dtype} {list(weight.shape)}; expected floating [V, d]."
    elif not bool(weight.isfinite().all()):
        row = int((~weight.isfinite().all(-1)).nonzero()[0])
        problem = (
            f"a weight that holds {weight[row][~weight[row].isfinite()][0]} in row {row}; expected finite values. Look "
            "at the checkpoint's lm_head (or embedding, where the two are tied)."
        )
    elif bias is not None and bool((bias.isnan() | (bias == torch.inf)).any()):
        problem = "a bias with NaN or +inf; expected finite values, or -inf for what never comes."
    elif bias is not None and bias.shape != weight.shape[:1]:
        problem = f"a bias {list(bias.shape)} beside a weight {list(weight.shape)}; expected [V]."
    if problem:
        raise IncompatibleModelError(f"SoftmaxGeometry got {problem}")
