"""Log-probabilities of labelled tokens in chunks, without the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.core.model.head import read_head
from lightning_interp.core.model.quantized import is_packed
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.training.adapter_state import is_sharded_tensor
from lightning_interp.models.training.metric import IGNORED

__all__ = ["ChunkedHead", "labelled_logps", "row_sums", "scored_positions"]

_NUMBERS = 2**24  # logits at a time: 64 MiB in float32


def scored_positions(labels: Tensor) -> Tensor:
    """Where a labelled token is predicted: indices of the flattened ``[batch, time]``, each one before its label."""
    scored = labels != IGNORED
    scored[:, 0] = False  # nothing predicts the first token
    return scored.flatten().nonzero()[:, 0] - 1


def row_sums(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Sum by row ``[batch]`` of values ``[n]`` at positions of the flattened ``shape``; in the same order each time."""
    return values.new_zeros(shape.numel()).scatter(0, positions, values).view(shape).sum(dim=1)


def labelled_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Log-probabilities of tokens under a head, with the logits of ``chunk`` tokens in memory at a time.

    Under a frozen head the gradient by what the head reads is found on the way forward, and nothing is computed twice.
    A trained head's logits are computed again on the way back. Inside autocast in its type, log-probabilities in
    float32 always.

    Args:
        hidden: What the head reads, ``[tokens, width]``.
        weight: Its ``[vocabulary, width]``.
        targets: Token ids ``[tokens]``.
        bias: Its ``[vocabulary]``, if there is one.
        scale: Factor of all logits.
        softcap: ``c`` of ``c tanh(z / c)``, which the logits go through.
        chunk: Tokens at a time; as many as have 64 MiB of logits if None.

    Returns:
        Natural logarithms ``[tokens]``, float32.

    Example:
        >>> labelled_logps(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 7])).exp()
        tensor([0.1250, 0.1250])
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    early = torch.is_grad_enabled() and not trained
    form = _Form(scale, softcap, chunk or max(1, _NUMBERS // len(weight)), dtype, early)
    found: Tensor = _Labelled.apply(hidden, weight, bias, targets, form)
    return found


class _Form(NamedTuple):
    scale: float
    softcap: float | None
    chunk: int
    dtype: torch.dtype  # of the products
    early: bool  # whether gradients are found on the way forward


class _Labelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: _Form) -> Tensor:
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden, dtype=form.dtype) if form.early else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, shift = _cast(form.dtype, weight, bias)
            for part in _parts(len(hidden), form.chunk):
                found[part], error = _chunk(hidden[part], matrix, shift, targets[part], form, slopes=form.early)
                if slope is not None:
                    torch.mm(error.to(form.dtype), matrix, out=slope[part])
                del error  # before the next ones are made
        ctx.form = form
        ctx.save_for_backward(hidden if slope is None else slope, weight, bias, targets)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, bias, targets = ctx.saved_tensors
        form: _Form = ctx.form
        if form.early:
            return kept * grad[:, None].to(kept), None, None, None, None
        by_hidden, by_weight = torch.empty_like(kept), torch.zeros_like(weight)
        by_bias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(kept.device.type, enabled=False):
            matrix, shift = _cast(form.dtype, weight, bias)
            for part in _parts(len(kept), form.chunk):
                _, error = _chunk(kept[part], matrix, shift, targets[part], form, slopes=True)
                slope = error.mul_(grad[part, None]).to(form.dtype)
                by_hidden[part] = slope @ matrix
                if form.dtype == weight.dtype:
                    by_weight.addmm_(slope.T, kept[part])
                else:
                    by_weight += slope.T @ kept[part].to(form.dtype)
                if by_bias is not None:
                    by_bias += slope.sum(dim=0)
                del error, slope
        return by_hidden, by_weight, by_bias, None, None


def _cast(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _parts(size: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, size, chunk))


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: _Form, *, slopes: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[n]``, and if asked their slopes by the linear map's values ``[n, vocabulary]``."""
    logits = nn.functional.linear(hidden.to(form.dtype), weight, bias).float()
    if form.scale != 1.0:
        logits = logits.mul_(form.scale)
    if form.softcap is not None:
        logits = logits.div_(form.softcap).tanh_().mul_(form.softcap)
    picked = logits.gather(1, targets[:, None])
    highest = logits.amax(dim=1, keepdim=True)
    shares = (logits.sub_(highest) if form.softcap is None else logits - highest).exp_()
    total = shares.sum(dim=1, keepdim=True)
    found = (picked - highest - total.log())[:, 0]
    if not slopes:
        return found, shares
    error = shares.div_(total).neg_()
    error.scatter_add_(1, targets[:, None], torch.ones_like(picked))
    if form.softcap is not None:
        error.mul_(logits.div_(form.softcap).square_().neg_().add_(1.0))
    return found, error if form.scale == 1.0 else error.mul_(form.scale)


class ChunkedHead:
    """Log-probabilities of a model's labelled tokens, with the logits of some of them in memory at a time.

    The head must be a plain linear map, perhaps with one factor or a soft cap behind it. Of any other one (with an
    adapter on it, quantised, sharded, compiled, or with a forward hook that could change the logits) all logits are
    made, and the numbers are the same.

    Args:
        model: The language model; its head may be tied, frozen or trained.
        chunk: Tokens at a time; as many as have 64 MiB of logits if None.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 8]])
        >>> head, positions = ChunkedHead(model), scored_positions(ids)
        >>> head.logps(lambda: model(ids).logits, ids, positions).shape
        torch.Size([3])
    """

    def __init__(self, model: Any, *, chunk: int | None = None) -> None:
        self.model, self.chunk = model, chunk
        self._form: tuple[float, float | None] | None = None
        self._readable = True

    def logps(self, run: Callable[[], Tensor], labels: Tensor, positions: Tensor) -> Tensor:
        """Log-probabilities of labelled tokens.

        Args:
            run: Runs the model on the batch and gives its logits.
            labels: ``[batch, time]``.
            positions: Where they are predicted, from :func:`scored_positions`.

        Returns:
            Natural logarithms ``[positions]``, float32, in their order.
        """
        targets = labels.flatten()[positions + 1]
        plain = self._plain_head()
        if plain is None:
            return _picked(run(), targets, positions)
        head, scale, softcap = plain
        with _one_column(head) as seen:
            logits = run()
        if not seen:  # compiled without the hook
            return _picked(logits, targets, positions)
        hidden = seen[-1].flatten(0, 1).index_select(0, positions)
        more: dict[str, Any] = {"bias": head.bias, "scale": scale, "softcap": softcap, "chunk": self.chunk}
        return labelled_logps(hidden, head.weight, targets, **more)

    def _plain_head(self) -> tuple[nn.Linear, float, float | None] | None:
        """The head if it is a linear map that nothing else acts on; its scale and soft cap are read once."""
        head = self.model.get_output_embeddings()
        if not self._readable or type(head) is not nn.Linear or is_packed(head.weight):
            return None
        if is_sharded_tensor(head.weight) or head._forward_hooks or self.model._forward_hooks:
            return None
        if self._form is None:
            try:
                with torch.autocast(head.weight.device.type, enabled=False):
                    read = read_head(self.model)
            except IncompatibleModelError:
                self._readable = False
                return None
            self._form = read.scale, read.softcap
        return head, *self._form


def _picked(logits: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """The same from all logits."""
    with torch.autocast(logits.device.type, enabled=False):
        rows = logits.flatten(0, 1).index_select(0, positions).float()
        return -nn.functional.cross_entropy(rows, targets, reduction="none")


@contextmanager
def _one_column(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let a head read its first column alone; what it was to read is in the list."""
    seen: list[Tensor] = []

    def spare(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:, :1].contiguous(), *args[1:])  # torch multiplies a strided slice row by row

    handle = head.register_forward_pre_hook(spare)
    try:
        yield seen
    finally:
        handle.remove()
