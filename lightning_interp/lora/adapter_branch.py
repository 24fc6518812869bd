"""The branches that several adapters add to one linear map, each to its own rows, in one differentiable step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Branch", "add_branches"]


@dataclass(eq=False, slots=True)
class Branch:
    """What one adapter does at one linear map, in one pass.

    Attributes:
        down: ``[rank, in]``.
        up: ``[rank, out]``, the second matrix of LoRA transposed, so that padding and stacking move whole rows.
        scale: Factor of the branch.
        rows: Its share of the pass: the first row (of all tokens, one behind the other) and the one behind the last.
        noise: Dropout of its input ``[n, in]``: zero where it is dropped, else the factor that keeps the mean.
        grads: Tensors like ``down`` and ``up`` to which their gradients are added; without, autograd is given them.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: tuple[int, int]
    noise: Tensor | None = None
    grads: tuple[Tensor, Tensor] | None = None


def add_branches(out: Tensor, x: Tensor, branches: Sequence[Branch], *, stacked: bool | None = None) -> Tensor:
    """Add to the output of a linear map what each adapter adds to its own rows: ``scale * up.T @ down @ x``.

    Rows of no branch stay as they are. An adapter's gradients come from its own rows alone, so a row that is not
    finite spoils those of its own adapter only. ``out`` may be overwritten.

    Args:
        out: Output of the linear map, ``[..., out]``.
        x: Its input, ``[..., in]``.
        branches: What is added, in the order of their rows, which do not overlap; all or none have ``grads``.
        stacked: Multiply all adapters at once, with rows and ranks padded to the most (the default on a GPU), or one
            after the other in place, without padding.

    Returns:
        A tensor like ``out``.

    Example:
        >>> down, up = torch.ones(1, 2), torch.tensor([[1.0, 0.0, 3.0]])
        >>> add_branches(torch.zeros(2, 3), torch.ones(2, 2), [Branch(down, up, 0.5, (1, 2))])
        tensor([[0., 0., 0.],
                [1., 0., 3.]])
    """
    branches = [branch for branch in branches if branch.rows[0] < branch.rows[1]]
    if not branches:
        return out
    work = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    if out._is_view():  # changing a view in place would cost autograd more than a copy
        out = out.clone()
    rows = x.numel() // x.shape[-1]
    plan = _Plan(branches, rows, x.is_cuda if stacked is None else stacked, work or branches[0].down.dtype)
    added: Tensor = _Branches.apply(out, x, plan, *(matrix for b in branches for matrix in (b.down, b.up)))
    return added


class _Plan:
    """What both passes know of the branches: their scales, dropout and rows, and how they are multiplied."""

    def __init__(self, branches: Sequence[Branch], rows: int, stacked: bool, dtype: torch.dtype) -> None:
        self.stacked, self.dtype = stacked, dtype
        self.scales = [branch.scale for branch in branches]
        self.noises = [branch.noise for branch in branches] if any(b.noise is not None for b in branches) else None
        self.grads = [grad for branch in branches for grad in branch.grads or (None, None)]
        ends = [0, *(end for branch in branches for end in branch.rows), rows]
        self._sizes = [end - start for start, end in pairwise(ends)]  # what is nobody's, and each branch's, in turn
        self.whole = not any(self._sizes[::2])

    def rows(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of each branch ``[n, width]``, as views of ``x``."""
        return x.reshape(-1, x.shape[-1]).split_with_sizes(self._sizes)[1::2]

    def cast(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same in the type of the products."""
        return [x if x.dtype == self.dtype else x.to(self.dtype) for x in tensors]

    def seen(self, x: Tensor) -> Sequence[Tensor]:
        """What each branch is fed with: its rows, some of their features dropped."""
        parts = self.cast(self.rows(x))
        if self.noises is None:
            return parts
        return [part if noise is None else part * noise for part, noise in zip(parts, self.noises, strict=True)]


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, plan: _Plan, *weights: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        total = out if out.dtype == plan.dtype and out.is_contiguous() else out.to(plan.dtype, copy=True).contiguous()
        run = _stacked_forward if plan.stacked else _looped_forward
        hidden = run(plan.rows(total), plan, plan.seen(x), plan.cast(weights))
        if total is not out:
            out.copy_(total)
        ctx.plan = plan
        ctx.save_for_backward(x, *weights, *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        x, *rest = ctx.saved_tensors
        given, hidden = rest[: 2 * len(plan.scales)], rest[2 * len(plan.scales) :]
        weights, gx, into = plan.cast(given), None, None
        if ctx.needs_input_grad[1]:
            gx = (torch.empty if plan.whole else torch.zeros)(x.shape, dtype=plan.dtype, device=x.device)
            into = plan.rows(gx)
        run = _stacked_backward if plan.stacked else _looped_backward
        grads = run(into, plan, plan.seen(x), plan.cast(plan.rows(grad)), weights, hidden)
        for part, noise in zip(into or (), plan.noises or (), strict=False):
            if noise is not None:
                part.mul_(noise)
        found = [g if g is None else g.to(weight.dtype) for g, weight in zip(grads, given, strict=True)]
        return grad, None if gx is None else gx.to(x.dtype), None, *found


def _looped_forward(
    into: Sequence[Tensor], plan: _Plan, parts: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Add each branch in place; gives the scaled coordinates ``[n, rank]`` of each."""
    kept = []
    for total, part, down, up, scale in zip(into, parts, weights[::2], weights[1::2], plan.scales, strict=True):
        hidden = nn.functional.linear(part, down)
        if scale != 1:
            hidden.mul_(scale)
        total.addmm_(hidden, up)
        kept.append(hidden)
    return kept


def _looped_backward(
    into: Sequence[Tensor] | None,
    plan: _Plan,
    parts: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of every ``down`` and ``up`` that are not added in place; those of the input are written in place."""
    found: list[Tensor | None] = []
    of_each = zip(parts, grads, weights[::2], weights[1::2], hidden, plan.scales, strict=True)
    for i, (part, grad, down, up, coordinates, scale) in enumerate(of_each):
        inner = nn.functional.linear(grad, up)
        if scale != 1:
            inner.mul_(scale)
        found += [_given(inner, part, plan.grads[2 * i]), _given(coordinates, grad, plan.grads[2 * i + 1])]
        if into is not None:
            torch.mm(inner, down, out=into[i])
    return found


def _given(left: Tensor, right: Tensor, into: Tensor | None) -> Tensor | None:
    """``left.T @ right``, or None once it is added to ``into``."""
    if into is None:
        return torch.mm(left.t(), right)
    if into.dtype == left.dtype:
        into.addmm_(left.t(), right)
    else:
        into.add_(torch.mm(left.t(), right))
    return None


def _stacked_forward(
    into: Sequence[Tensor], plan: _Plan, parts: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """The same in two products: rows, and ranks, are padded with zeros to the most ``[k, n, rank]``."""
    hidden = torch.bmm(_stack(parts), _stack(weights[::2]).mT)
    _scaled(hidden, plan)
    added = torch.bmm(hidden, _stack(weights[1::2]))
    torch._foreach_add_(list(into), [rows[: len(part)] for rows, part in zip(added.unbind(), parts, strict=True)])
    return [hidden]


def _stacked_backward(
    into: Sequence[Tensor] | None,
    plan: _Plan,
    parts: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    grad = _stack(grads)
    inner = torch.bmm(grad, _stack(weights[1::2]).mT)
    _scaled(inner, plan)
    downs, ups = torch.bmm(inner.mT, _stack(parts)), torch.bmm(hidden[0].mT, grad)
    if into is not None:
        given = torch.bmm(inner, _stack(weights[::2]))
        torch._foreach_copy_(list(into), [rows[: len(part)] for rows, part in zip(given.unbind(), parts, strict=True)])
    both = zip(downs.unbind(), ups.unbind(), weights[::2], strict=True)
    found = [whole[: len(weight)] for down, up, weight in both for whole in (down, up)]
    into_weights = [grad for grad in plan.grads if grad is not None]
    if not into_weights:
        return found
    torch._foreach_add_(into_weights, found)
    return [None] * len(found)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Matrices ``[n, width]`` of different heights as one ``[k, most, width]``, padded with zeros: two kernels."""
    most = max(map(len, parts))
    stacked = parts[0].new_zeros((len(parts), most, parts[0].shape[1]))
    torch._foreach_copy_([rows[: len(part)] for rows, part in zip(stacked.unbind(), parts, strict=True)], list(parts))
    return stacked


def _scaled(hidden: Tensor, plan: _Plan) -> None:
    torch._foreach_mul_(list(hidden.unbind()), plan.scales)
