"""LoRA settings, and adapters put into a model in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_interp.core.hooks.checks import quantized_modules
from lightning_interp.core.measure.seeding import derived_seed, seeded_rng
from lightning_interp.errors import IncompatibleModelError, QuantizedModelError
from lightning_interp.models.sources.adapters import ADAPTER, has_adapter
from lightning_interp.models.training.optimisation import check_settings, plain

__all__ = ["LoraSettings", "adapter_parameters", "check_precision", "inject_lora", "prepare_adapter", "train_adapter"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """How a low-rank adapter is made.

    Attributes:
        r: Rank.
        alpha: Scale; the update is multiplied by ``alpha / r`` (by ``alpha / sqrt(r)`` with ``use_rslora``).
        dropout: Dropout on the adapter's input while training.
        target_modules: Names of the linear maps that get an adapter, as PEFT matches them; ``"all-linear"`` for all
            but the output head. Fused expert weights of a mixture-of-experts model are no linear maps and get none.
        layers: Indices of the blocks that get an adapter; all if None. They go with a list of names or
            ``"all-linear"``; a pattern that is one text names its layers itself.
        use_rslora: Scale by the root of the rank.
        use_dora: Learn magnitude and direction apart (DoRA).

    Raises:
        RecipeError: If a value is out of range.

    Example:
        >>> LoraSettings(r=4, target_modules=["q_proj", "v_proj"]).alpha
        32
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    layers: Sequence[int] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        wanted = {
            "r": (self.r >= 1, "a rank of at least 1"),
            "alpha": (self.alpha > 0, "a number above 0"),
            "dropout": (0 <= self.dropout < 1, "0 <= dropout < 1"),
            "target_modules": (len(self.target_modules) > 0, "at least one, as nothing would be trained"),
            "layers": (self.layers is None or len(self.layers) > 0, "at least one, as nothing would be trained"),
        }
        if self.layers is not None and isinstance(self.target_modules, str) and not _all_linear(self.target_modules):
            wanted["target_modules"] = (False, "a list of names, or 'all-linear', beside layers")
        check_settings(self, "LoRA", wanted)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, which :class:`LoraSettings` takes back and a checkpoint can hold.

        Example:
            >>> LoraSettings(**LoraSettings(layers=(0, 1)).to_dict()).layers
            [0, 1]
        """
        return plain(self)


def check_precision(plugin: Any, *, purpose: str, instead: str) -> None:
    """Refuse Lightning's own quantisation, told apart by class name, for what trains an adapter."""
    if "BitsandbytesPrecision" in {cls.__name__ for cls in type(plugin).__mro__}:
        raise QuantizedModelError(
            f"{purpose} cannot use BitsandbytesPrecision: it quantises and freezes every linear map, those of the "
            f"adapter too, so nothing would be trained. Leave that plugin out, {instead} and "
            "Trainer(precision='bf16-mixed') or '32-true'."
        )


def prepare_adapter(
    model: PreTrainedModel, settings: LoraSettings | None, *, seed: int, task: str = "CAUSAL_LM"
) -> None:
    """Put a fresh adapter into a model, or without settings take the one that it carries, and train that alone.

    The base may be quantised; see :func:`inject_lora` and :func:`train_adapter`.
    """
    if quantized_modules(model):
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if settings is None:
        train_adapter(model)
    else:
        inject_lora(model, settings, seed=seed, task=task)


def inject_lora(model: PreTrainedModel, settings: LoraSettings, *, seed: int, task: str = "CAUSAL_LM") -> None:
    """Put a fresh adapter into a model, in place, and freeze everything else.

    The adapter's weights depend only on the seed and the model's shape, and are kept in float32 (the base keeps its
    own type). At the start the adapter changes nothing: its second matrix is zero. ``task`` is PEFT's name for what
    the model does; with ``"SEQ_CLS"`` the linear map of the scores is not adapted.
    """
    from peft import LoraConfig
    from peft.functional import inject_adapter_in_model

    if has_adapter(model):
        raise IncompatibleModelError(
            f"{type(model).__name__} carries the adapter {next(iter(model.peft_config))!r} already, so no new "
            "one is put in. Leave lora out to go on training it, or merge it into the base first."
        )
    total = getattr(model.config, "num_hidden_layers", None)
    for layer in settings.layers or ():
        if total is not None and not 0 <= layer < total:
            raise IncompatibleModelError(
                f"LoRA cannot adapt layer {layer} of {type(model).__name__}: it has the layers 0 to {total - 1}."
            )
    target, layers = settings.target_modules, settings.layers
    if layers is not None and _all_linear(target):  # PEFT takes layers beside names alone
        target = _linear_names(model, without=model.get_output_embeddings())
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        layers_to_transform=None if layers is None else list(layers),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task,
    )
    try:
        with seeded_rng(derived_seed(seed, "lora-init")):
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        if has_adapter(model):  # PEFT notes the adapter before it looks for the modules
            del model.peft_config
        raise IncompatibleModelError(
            f"LoRA finds no target_modules={target!r} in {type(model).__name__}: its linear maps are called "
            f"{', '.join(_linear_names(model))}. Name some of these, or 'all-linear'. ({error})"
        ) from error
    train_adapter(model)


def train_adapter(model: PreTrainedModel) -> None:
    """Freeze a model except for the adapter that it carries, whose weights become float32."""
    from peft.functional import cast_adapter_dtype, set_requires_grad

    names = list(model.peft_config)
    if names != [ADAPTER]:
        raise IncompatibleModelError(
            f"{type(model).__name__} carries the adapters {names}, expected one called {ADAPTER!r}. Load the "
            "adapter folder with load_causal_lm, or merge the others."
        )
    model.requires_grad_(False)
    set_requires_grad(model, ADAPTER, requires_grad=True)
    cast_adapter_dtype(model, ADAPTER)


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of the injected adapter."""
    return frozenset(name for name, _ in model.named_parameters() if f".{ADAPTER}" in name)


def _all_linear(target: str | Sequence[str]) -> bool:
    return isinstance(target, str) and target.lower() == "all-linear"


def _linear_names(model: nn.Module, *, without: nn.Module | None = None) -> list[str]:
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module != without]
    return sorted({name.rpartition(".")[2] for name in linear})
