"""An adapter in anybody's LightningModule: put in before optimisers exist, checkpointed alone, measured, exported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_interp.core.callbacks.intervention_callback import tokenizer_of
from lightning_interp.core.callbacks.monitor import Monitor
from lightning_interp.core.hooks.checks import check_strategy
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError, RecipeError, SiteError
from lightning_interp.lora.svd import update_norms
from lightning_interp.models.sources.adapters import ADAPTER, has_adapter, save_adapter
from lightning_interp.models.sources.folders import check_free
from lightning_interp.models.training.adapter_state import check_state, drop_base, saved_names
from lightning_interp.models.training.finetuning import base_source
from lightning_interp.models.training.lora import (
    LoraSettings,
    adapter_parameters,
    check_precision,
    prepare_adapter,
    train_adapter,
)

__all__ = ["LoraCallback", "UpdateNormCallback"]

_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_KEPT = ("r", "alpha", "use_rslora", "use_dora", "layers")  # what an adapter cannot change any more


class UpdateNormCallback(Monitor):
    """Log ``||s B A||_F`` of the adapter that a module trains, as ``<name>/update_norm``, for a :class:`CausalLM` too.

    At one learning rate the norm grows with the rank, so a comparison of ranks needs it beside its results.

    Args:
        every: See :class:`Monitor`.
        per_module: Also log ``<name>/update_norm/<module>`` of each module; the history then holds them too.
        adapter: Name of the adapter; None for the only one.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        name: Prefix of what is logged, and in the state key.

    Example:
        >>> UpdateNormCallback(every="epoch").prefix
        'lora'
    """

    reads_weights = True

    def __init__(
        self,
        every: int | str = 50,
        *,
        per_module: bool = False,
        adapter: str | None = None,
        target: str | None = None,
        name: str = "lora",
    ) -> None:
        super().__init__(every=every, at_end=True, name=name)
        self.per_module, self.adapter, self.target = per_module, adapter, target
        self._map: ModelMap | None = None

    def look(self, trainer: Any, module: Any) -> Mapping[str, float]:
        """The norm of the update, of each module if asked for."""
        norms = update_norms(self._found(module), adapter=self.adapter)
        each = {f"update_norm/{path}": norm for path, norm in norms.modules.items()} if self.per_module else {}
        return {"update_norm": norms.total, **each}

    def _found(self, module: nn.Module) -> ModelMap:
        if self._map is None or all(part is not self._map.model for part in module.modules()):
            self._map = ModelMap.build(module, target=self.target)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


class LoraCallback(UpdateNormCallback):
    """Put an adapter into the Hugging Face model of somebody's own LightningModule, and train it in place of the model.

    It goes in at the module's first ``setup``, before the optimisers exist: the model's other parameters are frozen,
    the module's own (a head beside the model) are trained as before. A checkpoint then holds the adapter and what lies
    beside the model, without the base, and ``fit(ckpt_path=...)`` goes on from it (``strict_loading`` is off, and what
    it would find is checked here). ``ModelCheckpoint(save_weights_only=True)`` asks no callback: it saves all weights.
    Train and evaluation modes stay as the module has them; transformers loads models in evaluation mode.

    Launchers that fork or spawn (``ddp_fork``, ``ddp_spawn``, notebooks) start from the module as it is: call
    :meth:`inject` before ``fit``, or the adapter is left in their processes. List it before ``WeightAveraging``.

    Args:
        settings: Of the adapter.
        seed: Root seed of its first weights, the same on every process.
        also_train: Modules of the Hugging Face model, by the end of their path, that are trained in full beside it and
            kept in checkpoints, such as ``score`` of a classifier.
        export: A PEFT folder to write when training ends; rank zero writes it.
        base: The base model that the folder names; by default where the model came from.
        overwrite: Whether that folder may be replaced.
        **logging: ``every``, ``per_module``, ``target`` and ``name`` of :class:`UpdateNormCallback`.

    Raises:
        RecipeError: If a setting has a wrong value.

    Example:
        >>> callback = LoraCallback(LoraSettings(r=1, alpha=1, target_modules=["down_proj"]), every=10)
        >>> callback.settings.r, callback.prefix
        (1, 'lora')
    """

    def __init__(
        self,
        settings: LoraSettings,
        *,
        seed: int = 0,
        also_train: Sequence[str] = (),
        export: str | os.PathLike[str] | None = None,
        base: str = "",
        overwrite: bool = False,
        **logging: Any,
    ) -> None:
        super().__init__(**logging, adapter=ADAPTER)
        self.settings, self.seed = settings, seed
        self.also_train = (also_train,) if isinstance(also_train, str) else tuple(also_train)
        self.export, self.base, self.overwrite = None if export is None else str(export), base, overwrite
        if not isinstance(settings, LoraSettings):
            raise RecipeError(f"LoraCallback(settings={settings!r}): expected LoraSettings(...).")
        if self.export and self.also_train:
            raise RecipeError(
                f"LoraCallback(export={self.export!r}, also_train={list(self.also_train)}): an adapter's folder would "
                "lack these modules. Leave export out, and keep a checkpoint."
            )

    def inject(self, module: nn.Module) -> None:
        """Put the adapter in and freeze the rest of the model; once: an adapter of the same settings is gone on with.

        Args:
            module: The LightningModule.

        Raises:
            SiteError: If it holds no Hugging Face model yet, or several, or none of the modules of ``also_train``.
            IncompatibleModelError: If the model carries another adapter, or lacks the target modules.
        """
        model: Any = self._found(module).model
        if has_adapter(model):
            self._check_same(model)
            train_adapter(model)
        else:
            kind = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), "CAUSAL_LM")
            prepare_adapter(model, self.settings, seed=self.seed, task=kind)
        for end in self.also_train:
            chosen = [part for path, part in model.named_modules() if f".{path}".endswith(f".{end}")]
            if not chosen:
                raise SiteError(f"also_train={end!r}: {type(model).__name__} has no module whose path ends so.")
            for part in chosen:
                part.requires_grad_(True)
        module.strict_loading = False  # type: ignore[assignment]
        self._map = ModelMap.build(module, target=self.target)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies and precisions that cannot train an adapter, then put it in.

        Raises:
            UnsupportedStrategyError: For FSDP and DeepSpeed.
            QuantizedModelError: For ``BitsandbytesPrecision``.
            ManifestError: If the folder to export to holds files.
        """
        title = f"LoraCallback on {type(pl_module).__name__}"
        instead = "load the base with transformers' BitsAndBytesConfig"
        check_precision(trainer.precision_plugin, purpose=title, instead=instead)
        check_strategy(trainer.strategy, reads_weights=True, purpose=title)
        if stage == "fit" and self.export:
            check_free(Path(self.export), self.overwrite)
        super().setup(trainer, pl_module, stage)
        fresh = not has_adapter(self._found(pl_module).model)
        self.inject(pl_module)
        launcher = {cls.__name__ for cls in type(trainer.strategy.launcher).__mro__}
        if fresh and stage == "fit" and "_MultiProcessingLauncher" in launcher:
            rank_zero_warn(
                f"{title} puts the adapter in inside of a forked or spawned process, so the module that fit was called "
                "with comes back without it. Call LoraCallback.inject(module) before fit, or keep a checkpoint."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse an optimiser that does not hold the adapter.

        Raises:
            IncompatibleModelError: If the adapter would not be trained.
        """
        model = self._found(pl_module).model
        names = adapter_parameters(model)
        adapter = {name: p for name, p in model.named_parameters() if name in names}
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        lost = [name for name, parameter in adapter.items() if id(parameter) not in held]
        frozen = [name for name, parameter in adapter.items() if not parameter.requires_grad]
        if lost or frozen:
            why = f"are in no optimiser: {lost[0]}" if lost else f"ask for no gradient: {frozen[0]}"
            raise IncompatibleModelError(
                f"{len(lost or frozen)} of {len(adapter)} parameters of the adapter {why}, so "
                f"{type(pl_module).__name__} would not train it. Collect parameters inside of configure_optimizers "
                "(self.parameters()), not before, and let no other callback freeze the model."
            )
        super().on_train_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen base out."""
        averaged = any("WeightAveraging" in cls.__name__ for cb in trainer.callbacks for cls in type(cb).__mro__)
        if not averaged:
            found = self._found(pl_module)
            drop_base(checkpoint, found.model, f"{found.path}.")

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks a part of the adapter, or holds more of the model than it has.

        Raises:
            IncompatibleModelError: With the first tensor that does not fit.
        """
        found = self._found(pl_module)
        prefix = f"{found.path}."
        given, own = (
            {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            for state in (checkpoint["state_dict"], pl_module.state_dict())
        )
        owner = f"the adapter of {type(pl_module).__name__}"
        check_state(given, own, saved_names(own, found.model, prefix), owner=owner)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, and the adapter's settings."""
        return {**super().state_dict(), "lora": self.settings.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an adapter of the same settings.

        Raises:
            IncompatibleModelError: If those of the checkpoint are others.
        """
        self._compare(state_dict["lora"], "The checkpoint's adapter was made")
        super().load_state_dict(state_dict)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look a last time, and write the adapter's folder."""
        super().on_train_end(trainer, pl_module)
        if self.export and trainer.is_global_zero:
            model: Any = self._found(pl_module).model
            tokenizer = tokenizer_of(pl_module, getattr(trainer, "datamodule", None))
            base = self.base or base_source(model, "")
            save_adapter(model, self.export, base=base, tokenizer=tokenizer, overwrite=self.overwrite)

    def _found(self, module: nn.Module) -> ModelMap:
        try:
            return super()._found(module)
        except SiteError as error:
            raise SiteError(
                f"LoraCallback finds no model to adapt: {error} A model must be there before setup and configure_model "
                "run: build it in __init__, or call LoraCallback(...).inject(self) behind the line that makes it and "
                "leave the callback out of the Trainer."
            ) from error

    def _check_same(self, model: Any) -> None:
        config = model.peft_config.get(ADAPTER)
        if config is None:
            train_adapter(model)  # says which adapters there are
        layers = config.layers_to_transform
        carried = {"r": config.r, "alpha": config.lora_alpha, "use_rslora": config.use_rslora}
        carried |= {"use_dora": config.use_dora, "layers": None if layers is None else list(layers)}
        if not isinstance(self.settings.target_modules, str):
            carried["target_modules"] = sorted(config.target_modules)
        self._compare(carried, f"{type(model).__name__} carries an adapter")

    def _compare(self, other: Mapping[str, Any], what: str) -> None:
        mine = {name: value for name, value in self.settings.to_dict().items() if name in (*_KEPT, "target_modules")}
        differing = {
            name: value for name, value in mine.items() if name in other and _plain(other[name]) != _plain(value)
        }
        if differing:
            name, value = next(iter(differing.items()))
            raise IncompatibleModelError(
                f"{what} with {name}={other[name]!r}, but LoraCallback has {name}={value!r}. Use the same settings, or "
                "a model without an adapter."
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set) else value
