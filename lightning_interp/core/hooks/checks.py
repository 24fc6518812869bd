"""What cannot work is refused before anything is changed, with the remedy."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lightning_interp.core.model.fingerprint import check_weights
from lightning_interp.core.model.quantized import quantized_kind
from lightning_interp.errors import CompiledModelError, QuantizedModelError, UnsupportedStrategyError

__all__ = ["check_dense", "check_hookable", "check_strategy", "check_weights", "is_sharded", "quantized_modules"]

_REFUSED = {
    "FSDPStrategy": "FSDP1 un-shards weights only inside its own wrappers; use ModelParallelStrategy (FSDP2) or DDP",
    "XLAFSDPStrategy": "use ModelParallelStrategy (FSDP2) or DDP",
    "DeepSpeedStrategy": "its ZeRO stages keep no whole weights; use DDP or ModelParallelStrategy (FSDP2)",
}
_SHARDED = ("ModelParallelStrategy",)
_WRAPPERS = {
    "FullyShardedDataParallel": "FSDP1 un-shards weights only inside itself; use FSDP2 (ModelParallelStrategy) or DDP",
    "DeepSpeedEngine": "its ZeRO stages keep no whole weights; use FSDP2 (ModelParallelStrategy) or DDP",
}


def check_hookable(module: nn.Module) -> None:
    """Refuse modules whose hooks would be ignored."""
    config = sys.modules.get("torch._dynamo.config")  # not imported: nothing was compiled with it
    ignored = getattr(config, "skip_nnmodule_hook_guards", True)
    outermost = getattr(module, "_compiler_ctx", None) is not None
    for name, child in module.named_modules():
        kind = type(child).__name__
        if kind in _WRAPPERS:
            raise UnsupportedStrategyError(f"{name or kind!r} is a {kind}: {_WRAPPERS[kind]}.")
        if ignored and (outermost or _is_compiled(child)):
            raise CompiledModelError(
                f"{name or type(module).__name__!r} is compiled, so hooks that are attached now would be silently "
                "ignored. Use the plain model, or set torch._dynamo.config.skip_nnmodule_hook_guards=False before the "
                "first call."
            )


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
        return True
    forward = module.__dict__.get("forward")  # model.forward = torch.compile(model.forward)
    return forward is not None and hasattr(forward, "_torchdynamo_orig_callable")


def quantized_modules(module: nn.Module) -> dict[str, str]:
    """How modules with quantised weights are quantised, by their names."""
    return {name: kind for name, child in module.named_modules() if (kind := quantized_kind(child)) is not None}


def check_dense(module: nn.Module, *, purpose: str, remedy: str) -> None:
    """Refuse a quantised model."""
    if found := quantized_modules(module):
        raise QuantizedModelError(
            f"{purpose} on a quantised base: {next(iter(found))} ({len(found)} modules of {type(module).__name__}) "
            f"holds quantised weights. {remedy}"
        )


def check_strategy(strategy: Any, *, reads_weights: bool, purpose: str) -> None:
    """Refuse Lightning strategies, told apart by class name, that cannot do what an intervention needs."""
    names = [cls.__name__ for cls in type(strategy).__mro__]
    for name, remedy in _REFUSED.items():
        if name in names:
            raise UnsupportedStrategyError(f"{purpose} does not support {type(strategy).__name__}: {remedy}.")
    if reads_weights and is_sharded(strategy):
        raise UnsupportedStrategyError(
            f"{purpose} uses weight values, which {type(strategy).__name__} keeps in shards. Use a single device or "
            "DDP."
        )


def is_sharded(strategy: Any) -> bool:
    """Whether a Lightning strategy shards weights, so that every process must take part in every forward pass."""
    return any(cls.__name__ in _SHARDED for cls in type(strategy).__mro__)
