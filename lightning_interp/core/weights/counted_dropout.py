"""Dropout inside of adapters that is drawn by counting: each coin depends on what it is for, never on what ran before.

A coin is a hash of the seed, the pass, the module, the row of the batch, the position of the token and the feature. So
choosing weights row by row moves no generator of torch, and a batch in parts has the dropout of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.masked_linear import RowMap, TokenMap
from lightning_interp.core.weights.row_masks import RowMask
from lightning_interp.errors import PositionError

__all__ = ["CountedDropout", "dropouts_in", "kept"]

_FIRST, _SECOND, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
"""Odd 64-bit constants (Stafford's mix 13 and the golden ratio), as signed integers."""


@dataclass(eq=False)
class CountedDropout:
    """What the dropout of adapters is drawn from in training: coins keyed by seed, step, row and token.

    ``step`` None counts the passes, and ``row_numbers`` ``[B]`` None the rows from 0: set them where the parts of one
    batch are passes of their own, or a run is resumed.
    """

    seed: int = 0
    step: int | None = None
    row_numbers: torch.Tensor | None = None
    _passes: int = field(default=0, init=False, repr=False)

    def wrap(
        self, function: RowMap, dropouts: Mapping[str, nn.Dropout], step: Callable[[], StepContext]
    ) -> RowMap | TokenMap:
        """A map whose dropout modules draw here while they are in training."""
        if not dropouts:
            return function

        def run(x: torch.Tensor, mask: RowMask, rows: torch.Tensor | None) -> Any:
            if not any(module.training for module in dropouts.values()):
                return function(x)
            number, tokens = self._counters(step(), mask.shape[1])
            chosen = tokens if rows is None else tokens[rows.to(tokens.device)]
            with ExitStack() as stack:
                for path, module in dropouts.items():
                    key = derived_seed(self.seed, "adapter dropout", number, path)
                    stack.enter_context(_replaced(module, key, chosen))
                return function(x)

        return TokenMap(run)

    def _counters(self, step: StepContext, columns: int) -> tuple[int, torch.Tensor]:
        """Number of the pass, and one number for each token ``[B * columns]``."""
        known = step.cache.get((id(self), "counters"))
        if known is None:
            number = self._passes if self.step is None else self.step
            self._passes += 1
            known = step.cache[id(self), "counters"] = (number, self._tokens(step))
        number, tokens = known
        return number, tokens[:, -columns:].flatten()

    def _tokens(self, step: StepContext) -> torch.Tensor:
        numbers = self.row_numbers
        if numbers is None:
            numbers = torch.arange(step.batch_size, device=step.device)
        if tuple(numbers.shape) != (step.batch_size,):
            raise PositionError(
                f"row_numbers has shape {tuple(numbers.shape)}, but the pass has {step.batch_size} rows; expected one "
                "number a row."
            )
        return (numbers.to(step.device, torch.int64) << 32)[:, None] + step.positions + 1


def dropouts_in(module: nn.Module, path: str) -> dict[str, nn.Dropout]:
    """Dropout modules that can drop something, by path, of a module that lies at ``path``."""
    found = module.named_modules(prefix=path)
    return {name: child for name, child in found if isinstance(child, nn.Dropout) and child.p > 0}


def kept(key: int, tokens: torch.Tensor, width: int, p: float) -> torch.Tensor:
    """Bool ``[n, width]``, True with probability ``1 - p``: a hash of the key, the token's number and the feature."""
    features = torch.arange(1, width + 1, device=tokens.device) * _GOLDEN + key
    mixed = _mix(_mix(tokens + key)[:, None] ^ _mix(features))
    if p >= 1:
        return torch.zeros_like(mixed, dtype=torch.bool)
    return mixed >= round(p * 2**64) - 2**63


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit integers that scatters them (overflow wraps)."""
    x = x.bitwise_xor((x >> 32) & 0xFFFFFFFF).mul_(_FIRST)
    return x.bitwise_xor_((x >> 29) & 0x7FFFFFFFF).mul_(_SECOND)


@contextmanager
def _replaced(module: nn.Dropout, key: int, tokens: torch.Tensor) -> Iterator[None]:
    """Let a dropout module draw from a key while it is in training."""
    p = float(module.p)

    def forward(x: torch.Tensor) -> torch.Tensor:
        keep = kept(key, tokens.to(x.device), x.shape[-1], p).view(x.shape)
        return x * keep.to(x.dtype).mul_(1 / (1 - p) if p < 1 else 0.0)

    before = module.__dict__.get("forward")
    if module.training:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before
