"""Which model: a fingerprint names the space of its hidden states, a digest its weights, a hash some numbers."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import nn

from lightning_interp.core.model.components import own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError, UnsupportedStrategyError

__all__ = ["check_fingerprint", "check_weights", "model_fingerprint", "tensor_hash", "weights_digest"]

_CHUNK = 2**22  # numbers that are hashed at a time
_SHOWN = 12  # digits of a fingerprint in messages
_MEMO = "fingerprint"

# By the module that holds the unembedding: what its weight looked like, and the fingerprint.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def model_fingerprint(model: nn.Module | ModelMap, *, target: str | None = None) -> str:
    """Name the space of a model's residual stream and last hidden state by a hash.

    The hash covers the model type, the width, the number of layers, and every number of the unembedding (of the input
    embedding in a model without one). Device and storage type do not matter: float32 and bfloat16 copies of the same
    numbers share a fingerprint, rounded ones do not. Of a head with an adapter the base weights count, so attaching one
    changes nothing. The weight is read in pieces, and hashed again only when it has changed.

    Args:
        model: A plain model, a PEFT wrapper, a LightningModule, or a map; if sharded, every process must ask.
        target: Dotted path of the Hugging Face model, where there are several.

    Returns:
        64 hexadecimal digits.

    Raises:
        IncompatibleModelError: If the model has no vocabulary, or no weights yet (meta device).
        SiteError: If no decoder is found.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> model_fingerprint(model) == model_fingerprint(tiny_model("llama").bfloat16().float())
        False
        >>> model_fingerprint(model) == model_fingerprint(tiny_model("llama").double())
        True
    """
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model, target=target)
    table = _vocabulary(model_map)
    weight = _whole(table.weight)
    if weight.device.type == "meta":
        raise IncompatibleModelError(
            f"The unembedding of {type(model_map.model).__name__} is on the meta device and holds no numbers, so the "
            "model has no fingerprint. Load its weights first."
        )
    seen = _glimpse(weight, table.weight, getattr(table, "bias", None))
    for found in (model_map.memo.get(_MEMO), _known.get(table)):
        if found is not None and found[0] == seen:
            return str(found[1])
    made = _hash(model_map, weight, getattr(table, "bias", None))
    model_map.memo[_MEMO] = _known[table] = (seen, made)
    return made


def check_fingerprint(
    found: str | None, expected: str | None, *, what: str = "This direction", model: str = "the model"
) -> None:
    """Refuse to use something on another model than the one it was made for.

    Args:
        found: Fingerprint of the model at hand; None if it was not asked for.
        expected: Fingerprint that was recorded; None if none was. Without both, nothing can be compared.
        what: What is to be used, for the message.
        model: Name of the model, for the message.

    Raises:
        IncompatibleModelError: If they differ; with the first digits of both.

    Example:
        >>> check_fingerprint("ab" * 32, "ab" * 32)
        >>> check_fingerprint("ab" * 32, "cd" * 32, what="probe.safetensors")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.IncompatibleModelError: probe.safetensors was made for a model with fingerprint ...
    """
    if found is None or expected is None or found == expected:
        return
    raise IncompatibleModelError(
        f"{what} was made for a model with fingerprint {expected[:_SHOWN]}, but {model} has {found[:_SHOWN]}. "
        "Use it on the model that it was made from, or make it again on this one."
    )


def check_weights(module: nn.Module, *, purpose: str) -> None:
    """Refuse models whose weight values are not whole on this process."""
    for name, parameter in module.named_parameters():
        kinds = (type(parameter).__name__, type(parameter.data).__name__) if type(parameter) is not nn.Parameter else ()
        if any("DTensor" in kind for kind in kinds) or hasattr(parameter, "ds_id"):
            raise UnsupportedStrategyError(
                f"{purpose} needs whole weights, but {name} of {type(module).__name__} is sharded. Use a single "
                "device or DDP."
            )


def weights_digest(model: nn.Module) -> str:
    """Digest by which stages of a training are told apart: of names, types, shapes and up to 64 values a parameter."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].cpu().contiguous().view(torch.uint8)
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        found.update(sample.numpy().tobytes())
    return found.hexdigest()


def tensor_hash(*tensors: torch.Tensor) -> str:
    """SHA-256 of tensors' shapes and numbers, as float32, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(list(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _vocabulary(model_map: ModelMap) -> Any:
    """The module with one row a token: the head without its adapter, or the input embedding."""
    module: Any = model_map.head
    if module is None and "embed" in model_map.shared:
        module = model_map.shared["embed"][0].module
    while module is not None and (inner := own_map(module)) is not None:
        module = inner
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise IncompatibleModelError(
            f"{type(model_map.model).__name__} has neither an unembedding nor an input embedding with a weight "
            f"(found {type(module).__name__}), so it has no fingerprint. Use a decoder with a vocabulary."
        )
    return module


def _whole(weight: torch.Tensor) -> torch.Tensor:
    full: Any = getattr(weight, "full_tensor", None)  # a sharded weight
    whole: torch.Tensor = weight.detach() if full is None else full().detach()
    return whole


@torch.no_grad()
def _glimpse(weight: torch.Tensor, *owners: torch.Tensor | None) -> tuple[Any, ...]:
    """What tells cheaply that a head has changed: place and version of its tensors, and three rows of its weight."""
    places = [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in owners if x is not None]
    rows = weight[torch.tensor([0, len(weight) // 2, len(weight) - 1], device=weight.device)]
    return places, tuple(weight.shape), weight.dtype, hashlib.sha256(_bytes(rows)).hexdigest()


@torch.no_grad()
def _hash(model_map: ModelMap, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    rows, *columns = weight.shape
    facts = {
        "model_type": model_map.config_value("model_type", ""),
        "hidden_size": model_map.config_value("hidden_size"),
        "layers": len(model_map),
        "vocabulary": [rows, *columns],
        "bias": bias is not None,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    step = max(1, _CHUNK // max(1, *columns, 1))
    for start in range(0, rows, step):
        digest.update(_numbers(weight[start : start + step]))
    if bias is not None:
        digest.update(_numbers(_whole(bias)))
    return digest.hexdigest()


def _numbers(part: torch.Tensor) -> bytes:
    """The numbers themselves, whatever type they are stored in: as float32 where that holds them exactly."""
    if not part.is_floating_point():  # packed by a quantiser
        return str(part.dtype).encode() + _bytes(part)
    narrow = part.float()
    exact = part.dtype != torch.float64 or bool((narrow.double() == part).all())
    return b"4" + _bytes(narrow) if exact else b"8" + _bytes(part)


def _bytes(part: torch.Tensor) -> bytes:
    return part.contiguous().cpu().view(torch.uint8).numpy().tobytes()
