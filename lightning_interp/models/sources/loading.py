"""One function that loads a causal language model from wherever it is."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.errors import RecipeError
from lightning_interp.models.sources.adapters import adapter_base, attach_adapter_folder, is_adapter_folder
from lightning_interp.models.sources.bundled import ALIASES, bundled_folder
from lightning_interp.models.sources.folders import short
from lightning_interp.models.sources.gguf_files import load_gguf
from lightning_interp.models.sources.pretrained import (
    LoadOptions,
    Quantization,
    load_folder,
    load_model,
    load_tokenizer_files,
    named_dtype,
    quiet_bars,
)

__all__ = ["LoadedModel", "load_causal_lm", "load_with"]

_TINY = "tiny:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class LoadedModel(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: The model, in evaluation mode as transformers gives it. Call ``.train()`` before training it.
        tokenizer: Its tokenizer.
        label: What to call it in tables and reports; says so when weights were dequantised.
        dequantised_from: ``"4-bit"`` and the like if the weights were dequantised, else None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    dequantised_from: str | None


def load_causal_lm(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    quantization: Quantization | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: What to load; the first of these that fits:

            - ``tiny:<family>``: a tiny random model, see :func:`~lightning_interp.testing.tiny_model`, for smoke runs;
            - ``smollm2-135m-instruct`` or ``gemma-3-270m``: a model that a Python package carries, dequantised once
              into a cache folder (Gemma is under Google's Gemma Terms of Use);
            - a folder with safetensors weights, or a PEFT adapter folder (its base is loaded, the adapter injected);
            - a ``.gguf`` file, dequantised at each load (see :func:`convert_gguf`);
            - a Hugging Face id.
        dtype: Type of the weights.
        quantization: Quantise the linear maps with bitsandbytes: ``"4bit"`` (NF4) or ``"8bit"``.
        revision: Branch, tag or commit of a Hugging Face id.
        trust_remote_code: Run Python code that comes with the model.
        cache_dir: Folder of converted models; ``$LIGHTNING_INTERP_CACHE`` or the user's cache folder if None.

    Returns:
        ``LoadedModel(model, tokenizer, label, dequantised_from)``.

    Raises:
        RecipeError: If the source is unknown or an argument has a wrong value; lists what exists.
        DataError: If a model file is missing, damaged, cut short or pickled.
        IncompatibleModelError: If an adapter does not fit its base.
        QuantizedModelError: If a ``.gguf`` file is to be quantised again.
        ManifestError: If the cache folder cannot be written.

    Example:
        >>> loaded = load_causal_lm("tiny:llama")
        >>> loaded.label, loaded.model.training, len(loaded.tokenizer)
        ('tiny:llama', False, 261)
    """
    options = LoadOptions(
        dtype=named_dtype(dtype),
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
    )
    return load_with(os.fspath(source), options)


def load_with(source: str, options: LoadOptions, adapter: Path | None = None) -> LoadedModel:
    """As :func:`load_causal_lm`, with checked options; ``adapter`` is the folder that names the source as its base."""
    path = Path(source).expanduser()
    if source.startswith(_TINY):
        return _tiny(source, options.without_revision(source))
    if source in ALIASES:
        return _bundled(source, options.without_revision(source))
    if source.strip() and path.is_dir():
        options = options.without_revision(source)
        if is_adapter_folder(path):
            return _adapter(path, options, adapter)
        return LoadedModel(*load_folder(path, options), label=_name(path), dequantised_from=None)
    if source.endswith(".gguf"):
        model, tokenizer, bits = load_gguf(path, options.without_revision(source))
        return LoadedModel(model, tokenizer, _labelled(_name(path), bits), bits)
    return _hub(source, path, options)


def _tiny(source: str, options: LoadOptions) -> LoadedModel:
    from lightning_interp.models.sources.tiny import byte_tokenizer, tiny_model

    model, tokenizer = tiny_model(source.removeprefix(_TINY), dtype=options.dtype), byte_tokenizer()
    if options.quantization is not None:
        with tempfile.TemporaryDirectory() as folder, quiet_bars():  # bitsandbytes quantises while loading
            model.save_pretrained(folder)
            model = load_model(folder, options)
    model.config._name_or_path = source
    return LoadedModel(model, tokenizer, source, None)


def _bundled(alias: str, options: LoadOptions) -> LoadedModel:
    folder, bits = bundled_folder(ALIASES[alias], options.cache_dir)
    model, tokenizer = load_folder(folder, options)
    model.config._name_or_path = alias
    return LoadedModel(model, tokenizer, _labelled(alias, bits), bits)


def _adapter(folder: Path, options: LoadOptions, adapter: Path | None) -> LoadedModel:
    if adapter is not None:
        raise RecipeError(
            f"The adapter in {adapter} names {str(folder)!r} as its base, which is an adapter itself. "
            "Merge that one into its base and name the merged folder."
        )
    base, revision = adapter_base(folder)
    loaded = load_with(base, replace(options, revision=revision), folder)
    attach_adapter_folder(loaded.model, folder)
    tokenizer = loaded.tokenizer
    if (folder / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer_files(folder, options)
    label = f"{_name(folder)} on {loaded.label}"
    return LoadedModel(loaded.model.eval(), tokenizer, label, loaded.dequantised_from)


def _hub(source: str, path: Path, options: LoadOptions) -> LoadedModel:
    near = difflib.get_close_matches(source, ALIASES, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    known = f"{', '.join(ALIASES)}, tiny:<family>"
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise RecipeError(
            f"There is no model at {source!r}: it is no folder, no .gguf file and no Hugging Face id.{meant} "
            f"Give the folder that holds config.json, a hub id, or one of the aliases {known}."
        )
    try:
        tokenizer = load_tokenizer_files(source, options)
        model = load_model(source, options)
    except OSError as error:
        raise RecipeError(
            f"There is no model {source!r}: it is no alias (those are {known}), there is no folder {str(path)!r}, and "
            f"as a Hugging Face id it cannot be loaded ({short(error)}).{meant} "
            "Check the name and the network, or give a local folder with safetensors weights."
        ) from error
    label = source if options.revision is None else f"{source}@{options.revision}"
    return LoadedModel(model, tokenizer, label, None)


def _name(path: Path) -> str:
    return path.resolve().name


def _labelled(name: str, bits: str | None) -> str:
    return f"{name} (dequantised {bits})" if bits else name
