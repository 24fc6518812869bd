"""Where weights come from: a second model, an adapter on the recipient itself, or a folder that is read bit by bit.

The *recipient* is the model that runs. For each of its row-wise modules, a source gives another map to use instead.
"""

from __future__ import annotations

import os
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_interp.core.hooks.checks import check_dense, check_weights, quantized_modules
from lightning_interp.core.hooks.intervention import split_output
from lightning_interp.core.model.components import Part, a_parameter, own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.fitting import (
    adapted_layers,
    adapters_of,
    check_registered,
    check_same_shapes,
    check_settings,
)
from lightning_interp.core.weights.tensors import TensorFolder, check_depth
from lightning_interp.errors import DataError, IncompatibleModelError, QuantizedModelError, RecipeError

__all__ = [
    "AdapterSource",
    "AnySource",
    "CheckpointSource",
    "ModelSource",
    "WeightSource",
    "linear_pair",
    "make_sources",
]

Quantized = Literal["refuse", "both", "mixed"]


class WeightSource(ABC):
    """A source of weights for every part of the recipient."""

    @abstractmethod
    def check(self, recipient: ModelMap) -> None:
        """Refuse a recipient that does not fit."""

    @abstractmethod
    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The donor's map for one part; None where it is the recipient's own."""

    def delta(self, part: Part) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What the donor adds to the recipient's map of one part, where that is cheaper than the whole map."""
        return None


class ModelSource(WeightSource):
    """A full model of the same architecture. Its modules are called, never registered anywhere.

    The donor may be on another device: rows are moved there and back.

    Args:
        model: The donor; a plain model, or anything that holds one.
        quantized: What to do where weights are quantised, because three different experiments are possible:
            ``refuse`` (default); ``both`` when recipient and donor are quantised alike, so that the pair compared is
            the quantised one; ``mixed`` when one is quantised and the other dense, so that the quantisation error is
            part of what a graft does (a warning says so).

    Example:
        >>> from lightning_interp.testing import tiny_pair
        >>> recipient, donor = tiny_pair("gpt2")
        >>> ModelSource(donor).check(ModelMap.build(recipient))
    """

    def __init__(self, model: nn.Module, *, quantized: Quantized = "refuse") -> None:
        if quantized not in ("refuse", "both", "mixed"):
            raise RecipeError(f"ModelSource(quantized={quantized!r}) is unknown; expected 'refuse', 'both' or 'mixed'.")
        self.map = ModelMap.build(model)
        self.quantized = quantized

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelSource) and self.map.model is other.map.model

    def __hash__(self) -> int:
        return hash((ModelSource, id(self.map.model)))

    def check(self, recipient: ModelMap) -> None:
        """Refuse other architectures, other shapes, and quantised or sharded models.

        Raises:
            IncompatibleModelError: If names, shapes or weightless settings differ (the first differences are named),
                or both are one object.
            QuantizedModelError: If either model is quantised and the caller has not said what that shall mean.
            UnsupportedStrategyError: If either model is sharded.
        """
        if self.map.model is recipient.model:
            raise IncompatibleModelError(
                f"Donor and recipient are the same {type(self.map.model).__name__} object, so nothing would change. "
                "Load the donor as a model of its own, or name an adapter of the recipient."
            )
        fitting = recipient.memo.setdefault("fitting donors", weakref.WeakSet())
        if self in fitting:
            return
        for model in (recipient.model, self.map.model):
            check_weights(model, purpose="Grafting from a full-weight donor")
        packed = [quantized_modules(each.model) for each in (recipient, self.map)]
        self._check_quantized(recipient, [sorted(set(each.values())) for each in packed])
        check_same_shapes(recipient, self.map, packed)
        check_registered(recipient)
        check_settings(recipient.model.config, self.map.model.config)
        fitting.add(self)

    def _check_quantized(self, recipient: ModelMap, kinds: Sequence[list[str]]) -> None:
        if self.quantized == "refuse" and any(kinds):
            for model in (recipient.model, self.map.model):
                check_dense(
                    model,
                    purpose="Grafting from a full-weight donor",
                    remedy="Load both models dense, or graft a LoRA adapter (donor='adapter name'), which leaves the "
                    "base alone; or say what is compared: ModelSource(model, quantized='both' or 'mixed').",
                )
        if self.quantized == "both" and kinds[0] != kinds[1]:
            raise QuantizedModelError(
                f"ModelSource(quantized='both') needs two models that are quantised alike, but the recipient has "
                f"{_listed(kinds[0])} and the donor {_listed(kinds[1])}. Load the other one with the same settings, or "
                "say quantized='mixed'."
            )
        if self.quantized == "mixed" and kinds[0] != kinds[1]:
            warnings.warn(
                f"The recipient has {_listed(kinds[0])} and the donor {_listed(kinds[1])}: what a graft changes is "
                "then finetuning and quantisation error together.",
                stacklevel=4,
            )

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The module of the same name, run where the donor lives and in its dtype; None if the two models share it."""
        module = self.map.model.get_submodule(part.path)
        if module is part.module:
            return None
        return _moved(module, a_parameter(module), part)


def _moved(run: Callable[..., Any], home: torch.Tensor, part: Part) -> Callable[..., Any]:
    """Run a module of another model on the recipient's rows: there, in its dtype, and back."""
    own = a_parameter(part.module)

    def there_and_back(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if own.device == home.device and own.dtype == home.dtype:
            return run(x, *args, **kwargs)
        floats = x.is_floating_point() and not part.per_call  # else token ids, positions or a padding mask
        cast = floats and home.is_floating_point() and not torch.is_autocast_enabled(x.device.type)
        there = x.to(home.device, home.dtype if cast else x.dtype)
        args = tuple(_to(value, home.device) for value in args)
        output = run(there, *args, **{key: _to(value, home.device) for key, value in kwargs.items()})
        return split_output(output)[0].to(x.device, x.dtype if floats else own.dtype)

    return there_and_back


class AdapterSource(WeightSource):
    """A LoRA adapter that sits on the recipient: recipient = adapters off, donor = this adapter on.

    Args:
        name: Name of the adapter, as PEFT knows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterSource) and self.name == other.name

    def __hash__(self) -> int:
        return hash((AdapterSource, self.name))

    def check(self, recipient: ModelMap) -> None:
        """Refuse adapters that are missing, merged, or switched off.

        Raises:
            IncompatibleModelError: With the remedy.
        """
        kind, layers = type(recipient.model).__name__, adapted_layers(recipient)
        known = sorted({name for _, _, names in layers for name in names})
        if self.name not in known:
            has = f"its adapters are {', '.join(map(repr, known))}" if known else "it has none"
            raise IncompatibleModelError(
                f"{kind} has no adapter {self.name!r}; {has}. Inject it first, or pass the finetuned model as donor."
            )
        for path, layer, _ in layers:
            self._check_layer(f"{path} of {kind}", layer)

    def _check_layer(self, where: str, layer: Any) -> None:
        if getattr(layer, "merged", False):
            raise IncompatibleModelError(
                f"Adapter {self.name!r} is merged into {where}, so the recipient is gone. Unmerge first."
            )
        if type(getattr(layer, "lora_variant", {}).get(self.name)).__name__.startswith("ALora"):
            raise IncompatibleModelError(
                f"Adapter {self.name!r} in {where} is an activated LoRA, which chooses its own tokens. "
                "Graft a plain LoRA, and name the tokens in the plan."
            )
        if getattr(layer, "disable_adapters", False):
            raise IncompatibleModelError(f"Adapter {self.name!r} is disabled in {where}. Enable adapters first.")

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The layer with this adapter alone; None for parts that it does not touch."""
        layer: Any = part.module
        if own_map(layer) is None or self.name not in adapters_of(layer):
            return None
        copies = getattr(layer, "modules_to_save", None)
        if copies is not None:
            saved: Callable[..., Any] = copies[self.name]
            return saved
        tokens = getattr(layer, "token_adapter", None)
        if tokens is not None:
            return lambda x: tokens.forward_adapters(x, [self.name])
        return lambda *args, **kwargs: self._alone(layer, *args, **kwargs)

    def _alone(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an adapted layer as if this were its one active adapter, past its hooks."""
        active = layer._active_adapter
        layer._active_adapter = [self.name]
        try:
            return layer.forward(*args, **kwargs)
        finally:
            layer._active_adapter = active

    def delta(self, part: Part) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``s B(A(x))`` of a plain LoRA linear map; None for variants such as DoRA, embeddings and saved modules."""
        layer: Any = part.module
        pair = linear_pair(layer, self.name)
        if pair is None or self.name in layer.lora_variant:
            return None
        (down, up), scale, drop = pair, layer.scaling[self.name], layer.lora_dropout[self.name]

        def low_rank(x: torch.Tensor) -> torch.Tensor:
            x = x.to(down.weight.dtype)
            low: torch.Tensor = down(drop(x) if drop.training else x)
            # Without a bias, scaling the r columns is the same and cheaper than scaling all of them.
            delta: torch.Tensor = up(low * scale) if up.bias is None else up(low) * scale
            return delta

        return low_rank


def linear_pair(layer: Any, name: str) -> tuple[nn.Linear, nn.Linear] | None:
    """``A`` and ``B`` of an adapter on a linear map; None for all else, such as stacked experts."""
    tables = (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {}))
    if any(name not in table for table in tables) or hasattr(layer, "parameter_name"):
        return None
    down, up = (table[name] for table in tables)
    return (down, up) if type(down) is type(up) is nn.Linear else None


class CheckpointSource(ModelSource):
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
        >>> from lightning_interp.testing import tiny_pair
        >>> recipient, donor = tiny_pair("llama")
        >>> donor.save_pretrained(folder := tempfile.mkdtemp())
        >>> CheckpointSource(folder).check(ModelMap.build(recipient))
    """

    def __init__(self, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        try:
            self._tensors = TensorFolder(self.folder)
            self._tensors.check()
        except DataError as error:
            raise IncompatibleModelError(
                f"{str(self.folder)!r} holds no readable safetensors: {error} Save the donor with save_pretrained, or "
                "pass a loaded model."
            ) from error
        super().__init__(_skeleton(self.folder))
        self._tensor_of = self._locate(self.map.model)

    def _locate(self, model: nn.Module) -> dict[str, str]:
        """Name in the files of each parameter; tied ones share."""
        by_parameter: dict[int, str] = {}
        stored = _loaded_names(model, self._tensors.files)
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
            weights = {name: self._tensors.tensor(stored, self.device) for name, stored in names.items()}
            return torch.func.functional_call(module, weights, args, kwargs)

        dtype = a_parameter(module).dtype
        return _moved(run, torch.empty(0, dtype=dtype, device=self.device), part)


def _skeleton(folder: Path) -> nn.Module:
    """The model of a folder without its weights (buffers are there)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_depth(folder)
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


def _loaded_names(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
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


AnySource = nn.Module | str | WeightSource
"""A finetuned model, the name of an adapter on the recipient, or a ready donor (made once, checked once)."""


def make_sources(donor: AnySource | Mapping[str, AnySource]) -> dict[str, WeightSource]:
    """Donors by source name; a single one is called ``donor``. A :class:`WeightSource` is taken as it is."""
    named = donor if isinstance(donor, Mapping) else {"donor": donor}
    made: dict[str, WeightSource] = {}
    for name, source in named.items():
        if isinstance(source, WeightSource):
            made[name] = source
        elif isinstance(source, str):
            made[name] = AdapterSource(source)
        elif isinstance(source, nn.Module):
            made[name] = ModelSource(source)
        else:
            raise IncompatibleModelError(
                f"Donor {name!r} is a {type(source).__name__}; expected a model or the name of an adapter on the "
                "recipient."
            )
    return made


def _listed(kinds: list[str]) -> str:
    return ", ".join(kinds) or "no quantised weights"


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
