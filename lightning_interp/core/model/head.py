"""The linear map behind a model's logits, whatever module carries it, checked against the model's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.core.model.fingerprint import check_weights
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import suspended
from lightning_interp.core.model.quantized import is_packed
from lightning_interp.errors import IncompatibleModelError, SiteError

__all__ = ["SoftmaxHead", "read_head", "whole_head"]

_PROBE_TOKENS = 6
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logits_soft_cap")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}  # of the logits' spread; narrower dtypes are rounded
_ROUNDED = 3e-2


@dataclass(frozen=True)
class SoftmaxHead:
    """Logits as a function of the state that the head reads: ``cap(scale * (G lam + bias))``.

    Args:
        weight: Unembedding ``G`` ``[V, d]``, as it is stored; never written to.
        bias: ``[V]`` or None.
        scale: Factor of all logits (cohere, granite and others have one).
        softcap: ``s`` of ``s tanh(z / s)``, or None.
        name: The model's class, for messages.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    name: str = "head"


def read_head(model: nn.Module | ModelMap, *, verify: bool = True) -> SoftmaxHead:
    """Find what maps the last hidden state to logits.

    A plain linear head is used as it is. Any other one (with an adapter on it, or quantised) is probed with the unit
    vectors once, which gives the linear map that it really applies.

    Args:
        model: A plain model, a PEFT wrapper, a LightningModule or a map of one.
        verify: Compare with the model's own logits on a few tokens; this also finds scale and softcap.

    Returns:
        The head; its weight shares memory with a plain linear head.

    Raises:
        SiteError: If the model has no head.
        IncompatibleModelError: If the model's logits are no such function of the head's input.
        UnsupportedStrategyError: If the weights are sharded.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> head = read_head(tiny_model("llama"))
        >>> tuple(head.weight.shape), head.scale, head.softcap
        ((261, 32), 1.0, None)
    """
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
    module = model_map.head
    name = type(model_map.model).__name__
    if module is None:
        raise SiteError(f"{name} has no unembedding, so it gives no next-token distribution. Use a causal LM.")
    check_weights(module, purpose="The softmax geometry")
    weight, bias = _linear_map(module, model_map)
    if not verify:
        return SoftmaxHead(weight, bias, name=name)
    states, logits = _observe(model_map, module)
    scale, softcap = _explain(states, logits, weight, bias, model_map)
    return SoftmaxHead(weight, bias, scale, softcap, name)


@torch.inference_mode(mode=False)
@torch.no_grad()
def _linear_map(module: nn.Module, model_map: ModelMap) -> tuple[torch.Tensor, torch.Tensor | None]:
    if type(module) is nn.Linear and not is_packed(module.weight):
        return module.weight, module.bias
    inner: Any = module
    width = int(model_map.config_value("hidden_size") or inner.in_features)
    like = next(p for p in module.parameters() if p.is_floating_point() or p.dtype == torch.uint8)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    with evaluating(module):
        zero = module.forward(torch.zeros(1, width, dtype=dtype, device=like.device))[0]
        rows = torch.eye(width, dtype=dtype, device=like.device)
        columns = [module.forward(part) - zero for part in torch.split(rows, 256)]
    bias = zero.float() if bool((zero != 0).any()) else None
    return torch.cat(columns).float().T.contiguous(), bias


@torch.no_grad()
def _observe(model_map: ModelMap, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads, and the model's logits, at a few tokens; what is attached to the model sees nothing."""
    model: Any = model_map.model
    device = next(module.parameters()).device
    rows = int(model_map.config_value("vocab_size"))
    ids = torch.linspace(0, rows - 1, min(_PROBE_TOKENS, rows), device=device).long()[None]
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        with suspended(model), evaluating(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    return seen[-1][0], logits[0]


def _explain(
    states: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, model_map: ModelMap
) -> tuple[float, float | None]:
    """Scale and softcap under which the linear map gives the model's logits."""
    linear = states.double() @ weight.detach().to(states.device).double().T
    if bias is not None:
        linear = linear + bias.detach().double()
    wanted = logits.double()
    softcap = next((float(c) for c in map(model_map.config_value, _SOFTCAPS) if c), None)
    tolerance = _TOLERANCE.get(states.dtype, _ROUNDED)
    for cap in dict.fromkeys((None, softcap)):
        uncapped = wanted if cap is None else cap * torch.atanh((wanted / cap).clamp(-1 + 1e-12, 1 - 1e-12))
        fitted = float((uncapped * linear).sum() / (linear * linear).sum())
        scale = _nearest_setting(fitted, model_map)
        made = scale * linear if cap is None else cap * torch.tanh(scale * linear / cap)
        if float((made - wanted).norm() / (wanted - wanted.mean()).norm().clamp_min(1e-12)) <= tolerance:
            return scale, cap
    raise IncompatibleModelError(
        f"The logits of {type(model_map.model).__name__} are not a scaled or softcapped linear map of what its head "
        f"({type(model_map.head).__name__}) reads: the best scale, {fitted:.4g}, leaves a difference. Remove hooks "
        "that change the logits, or pass the weight to SoftmaxGeometry yourself."
    )


def _nearest_setting(fitted: float, model_map: ModelMap) -> float:
    """A scale of the configuration where the fitted one is that but for rounding."""
    named = [
        value
        for name, value in vars(model_map.model.config).items()
        if ("logit" in name or "lm_head" in name) and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    known = [1.0, *(float(v) for v in named if v), *(1.0 / v for v in named if v)]
    nearest = min(known, key=lambda value: abs(value - fitted))
    return nearest if abs(nearest - fitted) <= 1e-2 * abs(fitted) else fitted


@contextmanager
def whole_head(model_map: ModelMap) -> Iterator[None]:
    """Hand the head its last column as one block: torch multiplies a strided slice by a frozen head row by row."""
    if model_map.head is None:
        yield
        return
    handle = model_map.head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
