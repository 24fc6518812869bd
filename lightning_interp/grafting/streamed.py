"""A donor that stays on disk: its weights are read module by module, while the recipient runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_interp.core.model.components import Part
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.grafting.donors import ModelDonor, moved

__all__ = ["CheckpointDonor"]


class CheckpointDonor(ModelDonor):
    """A finetuned model in a folder, never loaded as a whole: at most one module's weights are in memory.

    Each pass reads the weights that it uses again (from the page cache, after the first time), so this trades time for
    memory: one weight set and one module instead of two sets.

    Args:
        folder: A Hugging Face folder with ``config.json`` and safetensors.
        device: Where the donor's rows are computed.

    Raises:
        IncompatibleModelError: If the folder holds no safetensors, or lacks a tensor (mixtures of experts are stored
            expert by expert and put together in loading: load these).

    Example:
        >>> import tempfile
        >>> from lightning_interp import Graft, GraftPlan
        >>> from lightning_interp.testing import tiny_pair
        >>> recipient, donor = tiny_pair("llama")
        >>> folder = tempfile.mkdtemp()
        >>> donor.save_pretrained(folder)
        >>> with Graft(CheckpointDonor(folder), GraftPlan.whole()).attach(recipient), torch.no_grad():
        ...     torch.equal(recipient(torch.arange(5)[None]).logits, donor(torch.arange(5)[None]).logits)
        True
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self._files = _index(self.folder)
        super().__init__(_skeleton(self.folder))
        self._tensor_of = self._locate(self.map.model)

    def _locate(self, model: nn.Module) -> dict[str, str]:
        """Name in the files of each parameter; tied ones share."""
        by_parameter: dict[int, str] = {}
        stored = _loaded_names(model, self._files)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found = next((stored[n] for n in (name, name.removeprefix(prefix)) if n in stored), None)
            if found is not None:
                by_parameter.setdefault(id(parameter), found)
        missing = [n for n, p in model.named_parameters() if id(p) not in by_parameter]
        if missing:
            raise IncompatibleModelError(
                f"{str(self.folder)!r} has no tensor for {len(missing)} parameters of {type(model).__name__}: "
                f"{', '.join(missing[:3])}. Load the model and pass it as donor instead."
            )
        return {n: by_parameter[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The module of the same name, with weights that are read when it is called."""
        module = self.map.model.get_submodule(part.path)
        names = {name: self._tensor_of[f"{part.path}.{name}"] for name, _ in module.named_parameters()}

        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(module, self._read(names), args, kwargs)

        dtype = next(module.parameters()).dtype
        return moved(run, torch.empty(0, dtype=dtype, device=self.device), part)

    def _read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for name, stored in names.items():
            with safe_open(self._files[stored], framework="pt", device=str(self.device)) as file:
                found[name] = file.get_tensor(stored)
        return found


def _skeleton(folder: Path) -> nn.Module:
    """The model of a folder without its weights (buffers are there)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except (OSError, ValueError) as error:
        raise IncompatibleModelError(
            f"{str(folder)!r} cannot be read as a causal language model: {error}. Expected config.json and safetensors."
        ) from error
    model.tie_weights()  # type: ignore[operator]
    return model.eval()


def _loaded_names(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str]:
    """Stored name of each tensor by the name that transformers loads it under (families rename some)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [each for each in get_model_conversion_mapping(model) if type(each) is WeightRenaming]
    names = {}
    for stored in files:
        name = stored
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        names[name] = stored
    return names


def _index(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    from safetensors import SafetensorError, safe_open

    listed = folder / "model.safetensors.index.json"
    try:
        if listed.is_file():
            weights = json.loads(listed.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / Path(file).name for name, file in weights.items()}
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / "model.safetensors")
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise IncompatibleModelError(
            f"{str(folder)!r} holds no readable safetensors: {error}. Save the donor with save_pretrained, or pass a "
            "loaded model."
        ) from error
