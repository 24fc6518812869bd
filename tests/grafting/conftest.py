"""Pairs of tiny models, counts of hooks and hashes of weights, and a record of how far results lay apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lightning_interp.testing import tiny_pair

_KEY = pytest.StashKey[dict[str, tuple[float, float]]]()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _count(*models: nn.Module) -> int:
    modules = [module for model in models for module in model.modules()]
    return sum(len(getattr(module, table)) for module in modules for table in _HOOKS)


def _digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().contiguous().cpu()
        total.update(f"{name}{tuple(plain.shape)}{plain.dtype}".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="session")
def pairs() -> Iterator[Callable[[str], tuple[nn.Module, nn.Module]]]:
    """``pairs(family)``: the same recipient and donor for every test, which must leave them as found."""
    made: dict[str, tuple[nn.Module, nn.Module]] = {}
    found: dict[str, list[str]] = {}

    def get(family: str) -> tuple[nn.Module, nn.Module]:
        if family not in made:
            made[family] = tiny_pair(family)
            found[family] = [_digest(model) for model in made[family]]
        return made[family]

    yield get
    for family, models in made.items():
        assert [_digest(model) for model in models] == found[family], f"a test changed the weights of {family}"
        assert _count(*models) == 0, f"a test left hooks on {family}"


@pytest.fixture(scope="session")
def hook_count() -> Callable[..., int]:
    """``hook_count(*models)``: number of hooks on all their modules."""
    return _count


@pytest.fixture(scope="session")
def state_hash() -> Callable[[nn.Module], str]:
    """``state_hash(model)``: one hash over the names, shapes and bytes of its state."""
    return _digest


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``agree(actual, expected, what)``: equal up to float32 rounding; remembers the largest deviation of ``what``."""

    def check(actual: torch.Tensor, expected: torch.Tensor, what: str, *, tolerance: float = 1e-5) -> None:
        assert actual.shape == expected.shape
        scale = max(1.0, float(expected.abs().max()))
        apart = float((actual.float() - expected.float()).abs().max())
        seen = request.config.stash.setdefault(_KEY, {})
        most, share = seen.get(what, (0.0, 0.0))
        seen[what] = (max(most, apart), max(share, apart / scale))
        assert apart <= tolerance * scale, f"{what}: {apart:.2e} apart at a logit scale of {scale:.1f}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With ``-vv`` (or no ``-q``): how far results lay from their references, absolute and per logit scale."""
    if config.option.verbose >= 0 and (seen := config.stash.get(_KEY, None)):
        terminalreporter.section("largest deviations of logits: absolute, by max(1, logit scale)")
        for what, (most, share) in sorted(seen.items()):
            terminalreporter.write_line(f"{what:<40} {most:.2e} {share:.2e}")
