"""Models in ``.gguf`` files: checked, dequantised by transformers, and converted once into a normal folder."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.errors import DataError, QuantizedModelError
from lightning_interp.models.sources.folders import atomic_folder, short
from lightning_interp.models.sources.pretrained import LoadOptions, load_model, quiet_bars

__all__ = ["convert_gguf", "load_gguf", "precision_label", "read_gguf", "write_converted"]


def load_gguf(path: Path, options: LoadOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Load and dequantise a ``.gguf`` file: the model, its tokenizer, and the label of :func:`precision_label`.

    The file is checked whole before anything is built. The model is an ordinary one: it can be trained and saved.
    """
    if options.quantization is not None:
        raise QuantizedModelError(
            f"{path} cannot be loaded with quantization={options.quantization!r}: its weights are dequantised while "
            "loading. Convert it once with lightning_interp.models.convert_gguf and load that folder instead."
        )
    label = precision_label(path)
    return *_dequantise(path, options), label


def convert_gguf(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Dequantise a ``.gguf`` file into a folder in Hugging Face format (float32 safetensors and tokenizer).

    Loading the folder takes about a second where the ``.gguf`` file takes many, and gives the same weights.

    Args:
        path: The ``.gguf`` file.
        folder: The folder to make; it appears whole or not at all.
        overwrite: Whether a folder that holds files may be replaced.

    Returns:
        ``folder``.

    Raises:
        DataError: If the file is damaged, cut short, or of an architecture that transformers cannot read.
        ManifestError: If the folder holds files and ``overwrite`` is False, or cannot be written.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        precision_label(Path(path))
        write_converted(Path(path), temporary)
    return Path(folder)


def write_converted(path: Path, folder: Path) -> None:
    """Write model and tokenizer of a ``.gguf`` file that is known to be whole into an existing folder."""
    model, tokenizer = _dequantise(path, LoadOptions())
    with quiet_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def precision_label(path: Path) -> str | None:
    """Say how a ``.gguf`` file has most weights: ``"4-bit"`` and the like, or None for floating point."""
    weights: Counter[str] = Counter()
    for tensor in read_gguf(path).tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    if not weights:
        raise DataError(f"{path} holds no tensors, so it is no model. Copy or download it again.")
    kind = weights.most_common(1)[0][0]
    bits = re.match(r"(?:I?Q|TQ|MXFP|NVFP)(\d)", kind)
    return f"{bits[1]}-bit" if bits else None


def read_gguf(path: Path) -> Any:
    """A reader of a whole ``.gguf`` file; anything else is refused."""
    from gguf import GGUFReader

    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the path of a .gguf file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about the overflow that a damaged header causes
            return GGUFReader(path)
    except Exception as error:  # whatever the parser trips over: the file is not a whole .gguf file
        raise DataError(
            f"{path} is damaged, cut short or no .gguf file ({path.stat().st_size} bytes; {short(error)}). "
            "Copy or download it again."
        ) from error


def _dequantise(path: Path, options: LoadOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # The bar of this loader knows no switch, so it gets a stream of its own where nobody watches.
    watched = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stderr(watched):
        model = load_model(path.parent, options, gguf_file=path.name)
    # An ordinary model from here on: transformers refuses to save it while these fields are there.
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    model.config._name_or_path = str(path.resolve())
    try:
        if "tokenizer.ggml.model" not in read_gguf(path).fields:  # transformers 5.17 would take it for one of llama's
            raise ValueError("it does not name its kind (tokenizer.ggml.model).")
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers raises many kinds for tokenizers that it cannot convert
        raise DataError(
            f"The tokenizer inside {path} cannot be converted: {short(error)} "
            "Use the model's folder in Hugging Face format instead."
        ) from error
