"""The branches that several adapters add to one linear map, each to its own rows, in one differentiable step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Branch", "add_branches"]


@dataclass(frozen=True, eq=False)
class Branch:
    """What one adapter does at one linear map, in one pass.

    Attributes:
        down: ``[rank, in]``.
        up: ``[rank, out]``, the second matrix of LoRA transposed, so that padding and stacking move whole rows.
        scale: Factor of the branch.
        rows: Its share of the pass: the first row (of all tokens, one behind the other) and the one behind the last.
        noise: Dropout of its input ``[n, in]``: zero where it is dropped, else the factor that keeps the mean.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: tuple[int, int]
    noise: Tensor | None = None


def add_branches(out: Tensor, x: Tensor, branches: Sequence[Branch], *, stacked: bool | None = None) -> Tensor:
    """Add to the output of a linear map what each adapter adds to its own rows: ``scale * up.T @ down @ x``.

    Rows of no branch stay as they are. An adapter's gradients come from its own rows alone, so a row that is not
    finite spoils those of its own adapter only. ``out`` may be overwritten.

    Args:
        out: Output of the linear map, ``[..., out]``.
        x: Its input, ``[..., in]``.
        branches: What is added; their rows do not overlap.
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
    plan = _Plan(branches, x.is_cuda if stacked is None else stacked, work or branches[0].down.dtype)
    added: Tensor = _Branches.apply(out, x, plan, *(matrix for b in branches for matrix in (b.down, b.up)))
    return added


@dataclass(frozen=True, eq=False)
class _Plan:
    branches: Sequence[Branch]
    stacked: bool
    dtype: torch.dtype

    def shares(self, x: Tensor, *, dropped: bool) -> list[Tensor]:
        """The rows of each adapter ``[n, width]``, in the type of the products."""
        flat = x.reshape(-1, x.shape[-1])
        found = [flat[slice(*branch.rows)].to(self.dtype) for branch in self.branches]
        if not dropped:
            return found
        return [part if b.noise is None else part * b.noise for part, b in zip(found, self.branches, strict=True)]


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, plan: _Plan, *weights: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        total = out if out.dtype == plan.dtype and out.is_contiguous() else out.to(plan.dtype, copy=True).contiguous()
        flat = total.view(-1, total.shape[-1])
        run = _stacked_forward if plan.stacked else _looped_forward
        hidden = run(
            [flat[slice(*branch.rows)] for branch in plan.branches], plan, plan.shares(x, dropped=True), weights
        )
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
        weights, hidden = rest[: 2 * len(plan.branches)], rest[2 * len(plan.branches) :]
        run = _stacked_backward if plan.stacked else _looped_backward
        gx = flat = None
        if ctx.needs_input_grad[1]:
            gx = torch.zeros(x.shape, dtype=plan.dtype, device=x.device)
            flat = [gx.view(-1, x.shape[-1])[slice(*branch.rows)] for branch in plan.branches]
        grads = run(flat, plan, plan.shares(x, dropped=True), plan.shares(grad, dropped=False), weights, hidden)
        for into, branch in zip(flat or (), plan.branches, strict=False):
            if branch.noise is not None:
                into.mul_(branch.noise)
        found = [g.to(weight.dtype) for g, weight in zip(grads, weights, strict=True)]
        return grad, None if gx is None else gx.to(x.dtype), None, *found


def _looped_forward(into: list[Tensor], plan: _Plan, parts: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Add each branch in place; gives the scaled coordinates ``[n, rank]`` of each."""
    kept = []
    for i, (branch, part) in enumerate(zip(plan.branches, parts, strict=True)):
        down, up = (weight.to(plan.dtype) for weight in weights[2 * i : 2 * i + 2])
        hidden = (part @ down.T).mul_(branch.scale)
        into[i].addmm_(hidden, up)
        kept.append(hidden)
    return kept


def _looped_backward(
    into: list[Tensor] | None,
    plan: _Plan,
    parts: list[Tensor],
    grads: list[Tensor],
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of every ``down`` and ``up``; those of the input are written in place."""
    found = []
    for i, (branch, part, grad) in enumerate(zip(plan.branches, parts, grads, strict=True)):
        down, up = (weight.to(plan.dtype) for weight in weights[2 * i : 2 * i + 2])
        inner = (grad @ up.T).mul_(branch.scale)
        found += [inner.T @ part, hidden[i].T @ grad]
        if into is not None:
            torch.mm(inner, down, out=into[i])
    return found


def _stacked_forward(into: list[Tensor], plan: _Plan, parts: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The same in two products: rows, and ranks, are padded with zeros to the most ``[k, n, rank]``."""
    hidden = torch.bmm(_stack(parts), _stack(weights[::2], plan.dtype).mT)
    _scaled(hidden, plan)
    added = torch.bmm(hidden, _stack(weights[1::2], plan.dtype))
    torch._foreach_add_(into, [rows[: len(part)] for rows, part in zip(added.unbind(), parts, strict=True)])
    return [hidden]


def _stacked_backward(
    into: list[Tensor] | None,
    plan: _Plan,
    parts: list[Tensor],
    grads: list[Tensor],
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
) -> list[Tensor]:
    grad = _stack(grads)
    inner = torch.bmm(grad, _stack(weights[1::2], plan.dtype).mT)
    _scaled(inner, plan)
    downs, ups = torch.bmm(inner.mT, _stack(parts)), torch.bmm(hidden[0].mT, grad)
    if into is not None:
        given = torch.bmm(inner, _stack(weights[::2], plan.dtype))
        torch._foreach_copy_(into, [rows[: len(part)] for rows, part in zip(given.unbind(), parts, strict=True)])
    both = zip(downs.unbind(), ups.unbind(), weights[::2], strict=True)
    return [whole[: len(weight)] for down, up, weight in both for whole in (down, up)]


def _stack(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Matrices ``[n, width]`` of different heights as one ``[k, most, width]``, padded with zeros: two kernels."""
    most = max(map(len, parts))
    stacked = parts[0].new_zeros((len(parts), most, parts[0].shape[1]), dtype=dtype or parts[0].dtype)
    torch._foreach_copy_([rows[: len(part)] for rows, part in zip(stacked.unbind(), parts, strict=True)], list(parts))
    return stacked


def _scaled(hidden: Tensor, plan: _Plan) -> None:
    torch._foreach_mul_(list(hidden.unbind()), [branch.scale for branch in plan.branches])
