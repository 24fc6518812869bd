"""Finetuned weights on a server under a name of their own, so that one name never stands for two models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import digest, sha256_file
from lightning_interp.errors import DataError
from lightning_interp.generation.endpoint import EndpointGenerator

__all__ = ["serve_adapter", "unload_adapter", "weights_folder_digest"]

_ADAPTER, _WHOLE = "adapter_config.json", "config.json"
_SHOWN = 12  # characters of a digest that a served name ends in


def serve_adapter(base_url: str, name: str, folder: str | os.PathLike[str], **options: Any) -> EndpointGenerator:
    """Let a server load an adapter, and ask it there.

    The adapter is served as ``name-<beginning of its digest>``: other weights get another name, and one that the server
    has already is not loaded again. vLLM loads adapters while it runs if it was started with ``--enable-lora`` and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``. ``transformers serve`` has no adapters, but takes the path of a folder as
    a model's name: give it one of whole (merged) weights, and nothing is called beforehand.

    Args:
        base_url: Address of the endpoint.
        name: What to call it there, such as ``chain-cycle-003``.
        folder: A PEFT adapter, or a whole model; the server reads it at the same path.
        **options: Further ones of :class:`~lightning_interp.generation.endpoint.EndpointGenerator`.

    Returns:
        A writer whose identity has the digest of the weights.

    Raises:
        DataError: If the folder has no weights.
        RecipeError: If the server cannot be reached or does not load it.

    Example:
        >>> serve_adapter("http://localhost:8000/v1", "cycle-003", "runs/bliss/cycle-003/adapter")  # doctest: +SKIP
    """
    path = Path(folder).resolve()
    weights = weights_folder_digest(path)
    adapter = (path / _ADAPTER).is_file()
    model = f"{name}-{weights[:_SHOWN]}" if adapter else str(path)
    writer = EndpointGenerator(model, base_url=base_url, name=f"{name}@{weights}", **options)
    if adapter and model not in [one.get("id") for one in writer.call("models").get("data", ())]:
        writer.call("load_lora_adapter", {"lora_name": model, "lora_path": str(path)})
    return writer


def unload_adapter(writer: EndpointGenerator) -> None:
    """Let the server forget an adapter.

    Args:
        writer: From :func:`serve_adapter`, of an adapter.

    Raises:
        RecipeError: If the server cannot be reached or does not know it.

    Example:
        >>> unload_adapter(EndpointGenerator("cycle-003", base_url="http://localhost:8000/v1"))  # doctest: +SKIP
    """
    writer.call("unload_lora_adapter", {"lora_name": writer.model})


def weights_folder_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of the weights in a folder and of the settings that say what they mean.

    Args:
        folder: An adapter or a model, as safetensors.

    Raises:
        DataError: If it has no settings or no weights.
    """
    path = Path(folder)
    settings = next((one for one in (path / _ADAPTER, path / _WHOLE) if one.is_file()), None)
    weights = sorted(path.glob("*.safetensors"))
    if settings is None or not weights:
        raise DataError(
            f"{str(path)!r} holds no weights that a server can load: expected {_ADAPTER} or {_WHOLE} and *.safetensors "
            "there. Save the adapter or the model into it first."
        )
    return digest({one.name: sha256_file(one) for one in (settings, *weights)})
