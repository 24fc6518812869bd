"""Model folders and hub ids in Hugging Face format: safetensors only, complete, optionally quantised."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.weights.tensors import check_depth
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.sources.folders import check_weight_files, short

__all__ = [
    "LoadOptions",
    "checkpoint_blocks",
    "load_folder",
    "load_model",
    "load_tokenizer_files",
    "named_dtype",
    "quiet_bars",
]

Quantization = Literal["4bit", "8bit"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded, as :func:`load_causal_lm` says, checked at construction."""

    dtype: torch.dtype = torch.float32
    quantization: Quantization | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise RecipeError(
                f"A model cannot be loaded with dtype {self.dtype!r}: expected torch.float32, torch.bfloat16 or "
                "torch.float16."
            )
        if self.quantization not in (None, *get_args(Quantization)):
            raise RecipeError(f"There is no quantization {self.quantization!r}; choose '4bit', '8bit' or None.")

    def without_revision(self, source: str | Path) -> LoadOptions:
        """The same options, refused with a revision: only hub ids have some."""
        if self.revision is not None:
            raise RecipeError(
                f"revision={self.revision!r} means nothing for {str(source)!r}: only Hugging Face ids have revisions. "
                "Leave it out."
            )
        return self


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The type that a name stands for."""
    if not isinstance(dtype, str):
        return dtype
    found: Any = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise RecipeError(f"There is no type {dtype!r} of weights; choose float32, bfloat16 or float16.")
    return found


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Switch transformers' progress bars off while something loads, unless a person watches a terminal."""
    if sys.stderr.isatty() or not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()


def load_folder(folder: Path, options: LoadOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer of a folder in Hugging Face format."""
    path = folder / "config.json"
    if not path.exists():
        raise DataError(
            f"{folder} is no model folder: it has no config.json, only {_listed(folder)}. Expected a folder "
            "written by save_pretrained, or a PEFT adapter folder with an adapter_config.json."
        )
    try:
        parse_json(path.read_bytes(), twice=True)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({short(error)}). Copy or download it again.") from error
    check_weight_files(folder)
    tokenizer = load_tokenizer_files(folder, options)
    return load_model(folder, options), tokenizer


def load_model(
    where: str | Path, options: LoadOptions, *, auto: Any = AutoModelForCausalLM, **more: Any
) -> PreTrainedModel:
    """Load the weights of a folder or hub id (OSError if it cannot be reached); none of them may be left random."""
    check_depth(Path(where))
    if options.quantization is not None:
        # Under a launcher every process quantises onto the device that Lightning will give it.
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        more |= {"quantization_config": _bitsandbytes(options), "device_map": {"": device}}
    try:
        with quiet_bars():
            model, found = auto.from_pretrained(
                where,
                dtype=options.dtype,
                use_safetensors=True,
                revision=options.revision or "main",
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
                **more,
            )
    except (ValueError, RuntimeError, SafetensorError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        if "trust_remote_code" in str(error) and not options.trust_remote_code:
            raise DataError(
                f"The model in {str(where)!r} brings Python code of its own, which is not run unasked. Read that code, "
                "and pass trust_remote_code=True if it may run here."
            ) from error
        raise DataError(
            f"The model in {str(where)!r} cannot be loaded: {short(error)} "
            "Check its config.json and weights, or save it again."
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"The weights in {str(where)!r} lack {missing[0]!r} ({len(missing)} tensors of {type(model).__name__} "
            "in all), which would be left random. Save the whole model again with save_pretrained."
        )
    if options.quantization == "4bit":
        _warn_of_narrow_maps(model)
    return model.eval()


def _warn_of_narrow_maps(model: PreTrainedModel) -> None:
    # The AVX-512 kernel of bitsandbytes starts its blocks anew in every row, the quantisation runs on: rows that are no
    # whole number of blocks come out with the scales of others.
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize and module.weight.device.type == "cpu":
            warnings.warn(
                f"{name!r} has rows of {state.shape[-1]} values, no multiple of the block of {state.blocksize}: some "
                "CPUs compute such a 4-bit map with wrong scales. Use quantization='8bit' where values matter.",
                stacklevel=4,
            )
            return


def load_tokenizer_files(where: str | Path, options: LoadOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id (OSError if it cannot be reached)."""
    folder = Path(where)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise DataError(
            f"{folder} has no tokenizer files; it holds {_listed(folder)}. Save the model's tokenizer beside it with "
            "tokenizer.save_pretrained."
        )
    try:
        return AutoTokenizer.from_pretrained(
            where, revision=options.revision or "main", trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged tokenizer.json
        if isinstance(error, OSError) and not folder.is_dir():
            raise
        raise DataError(
            f"The tokenizer in {str(where)!r} cannot be loaded: {short(error)} Save it again with save_pretrained."
        ) from error


def _listed(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"


def _bitsandbytes(options: LoadOptions) -> Any:
    from transformers import BitsAndBytesConfig

    if options.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    how = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": options.dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{name}": value for name, value in how.items()})


def checkpoint_blocks(model: Any) -> None:
    """Turn gradient checkpointing on; transformers renamed the method in 5.23."""
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on({"use_reentrant": False})  # the other kind marks parameters ready twice under DDP
