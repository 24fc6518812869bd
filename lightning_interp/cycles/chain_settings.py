"""What holds for a whole chain of cycles, what a phase is and sees of its chain, and the settings of the paper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch

from lightning_interp.core.storage.files import digest
from lightning_interp.errors import RecipeError
from lightning_interp.generation.requests import TextGenerator
from lightning_interp.models.data.prompt_pool import Pool
from lightning_interp.models.training.adapter_slot import AdapterSlot
from lightning_interp.models.training.lora import LoraSettings
from lightning_interp.models.training.optimisation import check_settings, check_types, plain

__all__ = [
    "PRESETS",
    "Bars",
    "ChainSettings",
    "CycleContext",
    "CycleFiles",
    "DataRule",
    "Init",
    "Phase",
    "Settings",
    "changed",
    "check_overrides",
    "numbered",
    "plain_settings",
    "plain_value",
    "shown",
]

Init = Literal["reinit", "continual"]
DataRule = Literal["replace", "mix", "accumulate"]

Bars = Callable[[str, float], AbstractContextManager[Any]]
"""Shows a bar for a description and a number of steps; what it gives has ``advance``."""

Settings = TypeVar("Settings")
_LORA = LoraSettings(r=16, alpha=32)


@dataclass(kw_only=True)
class ChainSettings:
    """What holds for a whole chain of cycles; ``M_k`` is the model after cycle ``k``.

    Args:
        model: A source for :func:`load_causal_lm`: the base ``B``.
        cycles: How many, cycle 0 (the seed) among them. More of them go on in the same folder.
        seed: Root of every random choice.
        init: What each cycle's training starts from: ``B`` with the fresh adapter, the same in every cycle, or
            ``M_{k-1}``. The optimizer starts anew in both.
        restart_cycles: Cycles of a continual chain that start from ``B`` with the fresh adapter.
        data_rule: What a cycle is trained on: its own rows alone; with ``round(real_fraction * n)`` rows of the seed
            beside its ``n``; or the seed's and every cycle's rows until now.
        real_fraction: Rows of the seed for each own row, of ``mix``.
        generator: Who writes a cycle's rows: ``previous`` is ``M_{k-1}``; ``base``, a control, is ``B``.
        lora: The adapter.
        match_templates: Train under the system text that models are asked under. If False, as in the paper, training
            rows have an empty system text in front, and requests have none of their own.
        system_prompt: System text of requests; None keeps what the chat template does without one.
        chat: Whether prompts become a user's turn; None if the tokenizer has a chat template.
        dtype: Type of the base's weights.

    Raises:
        RecipeError: If a value is out of range.
    """

    model: str
    cycles: int
    seed: int = 0
    init: Init = "reinit"
    restart_cycles: Collection[int] = ()
    data_rule: DataRule = "replace"
    real_fraction: float = 0.0
    generator: Literal["previous", "base"] = "previous"
    lora: LoraSettings = _LORA
    match_templates: bool = True
    system_prompt: str | None = None
    chat: bool | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_types(self, "A chain of cycles")
        if isinstance(self.lora, Mapping):
            self.lora = changed(_LORA, self.lora, where="lora")
        mix = self.data_rule == "mix"
        wanted = {
            "cycles": (self.cycles >= 1, "at least 1"),
            "init": (self.init in get_args(Init), f"one of {', '.join(get_args(Init))}"),
            "lora": (isinstance(self.lora, LoraSettings), "LoraSettings"),
            "restart_cycles": (
                isinstance(self.restart_cycles, Collection)
                and all(type(one) is int and one >= 0 for one in self.restart_cycles),
                "numbers of cycles",
            ),
        }
        check_settings(self, "A chain of cycles", wanted)
        wanted = {
            "restart_cycles": (self.init == "continual" or not self.restart_cycles, "none, as init is not continual"),
            "data_rule": (self.data_rule in get_args(DataRule), f"one of {', '.join(get_args(DataRule))}"),
            "real_fraction": (self.real_fraction > 0 if mix else self.real_fraction == 0, "a number above 0 with "
                              "data_rule='mix', and 0 without"),
            "generator": (self.generator in ("previous", "base"), "previous or base"),
        }  # fmt: skip
        check_settings(self, "A chain of cycles", wanted)

    def is_fresh(self, cycle: int) -> bool:
        """Whether a cycle's training starts from the base with the fresh adapter.

        Example:
            >>> chain = ChainSettings(model="tiny:llama", cycles=4, init="continual", restart_cycles={2})
            >>> [chain.is_fresh(cycle) for cycle in range(4)]
            [True, False, True, False]
        """
        return cycle == 0 or self.init == "reinit" or cycle in self.restart_cycles


def changed(settings: Settings, changes: Mapping[str, Any], *, where: str) -> Settings:
    """Settings of which some differ; those inside others are given as mappings.

    Args:
        settings: A dataclass.
        changes: New values by name.
        where: What is changed, for messages.

    Returns:
        A new one.

    Raises:
        RecipeError: If there is no such setting.

    Example:
        >>> changed(LoraSettings(r=4), {"alpha": 8}, where="overrides[3]").alpha
        8
    """
    known = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            raise RecipeError(f"{where} names {name!r}, which {type(settings).__name__} lacks: {', '.join(known)}.")
    found = {}
    for name, value in changes.items():
        own = getattr(settings, name)
        inside = is_dataclass(own) and isinstance(value, Mapping)
        found[name] = changed(own, value, where=f"{where}.{name}") if inside else value
    return replace(settings, **found)  # type: ignore[type-var]


def check_overrides(given: Any) -> None:
    """Refuse overrides that are no settings by phase by number of a cycle."""
    for cycle, changes in given.items() if isinstance(given, Mapping) else [(None, None)]:
        named = isinstance(changes, Mapping) and all(isinstance(one, Mapping) for one in changes.values())
        if type(cycle) is not int or cycle < 0 or not named:
            raise RecipeError(
                f"overrides has {given!r:.60}; expected settings by phase by number of a cycle (from 0), such as "
                '{3: {"fit-sft": {"epochs": 2}}}.'
            )


def plain_settings(settings: Any, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Settings as plain values that name a run: a function by its name, rows by their number and digest.

    Args:
        settings: A dataclass.
        without: Fields that do not count.

    Returns:
        Values by name.

    Example:
        >>> plain_settings(LoraSettings(r=4), without=["layers"])["r"]
        4
    """
    return {
        field.name: plain_value(getattr(settings, field.name))
        for field in fields(settings)
        if field.name not in without
    }


def plain_value(value: Any) -> Any:
    """A value as it stands in :func:`plain_settings`."""
    if callable(getattr(value, "identity", None)):
        return plain_value(value.identity())
    if is_dataclass(value) and not isinstance(value, type):
        return plain_value(plain(value))
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(one) for key, one in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        values = [plain_value(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
        rows = any(isinstance(one, Mapping) for one in values)
        return {"rows": len(values), "sha256": digest(values)} if rows else values
    return value if isinstance(value, str | int | float | None) else type(value).__qualname__


@dataclass(frozen=True)
class CycleFiles:
    """What a finished cycle left: rows of its own, if it wrote any, and its adapter."""

    rows: Path | None
    adapter: Path | None


@dataclass(frozen=True)
class CycleContext:
    """What a phase sees of its chain and cycle.

    Args:
        chain: Settings of the chain.
        cycle: Number of the cycle.
        slot: The model, of which phases put in the adapter that they need.
        pool: Reads the prompts.
        trainer: Gives arguments of a Trainer, anew for each.
        writer: Makes who writes for a name and a folder of PEFT (None: the base); the model itself if None.
        bar: Shows a bar for a description and a number of steps.
        earlier: What the cycles before this one left.
        seed_rows: Rows of the seed.
        rows: Rows of this cycle until now.
        data: What it trains on.
        adapter: Its own policy until now.
        references: What evaluations found of the base that others are measured against, by a digest of their settings.
    """

    chain: ChainSettings
    cycle: int
    slot: AdapterSlot
    pool: Callable[[], Pool]
    trainer: Callable[[], Mapping[str, Any]] = dict
    writer: Callable[[str, Path | None], TextGenerator] | None = None
    bar: Bars | None = None
    earlier: tuple[CycleFiles, ...] = ()
    seed_rows: Path | None = None
    rows: Path | None = None
    data: Path | None = None
    adapter: Path | None = None
    references: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Path | None:
        """The adapter that a training begins with; None for the fresh one."""
        if self.adapter is not None:
            return self.adapter
        return None if self.chain.is_fresh(self.cycle) else self.earlier[-1].adapter

    def author(self, back: int = 1) -> Path | None:
        """The adapter of the model so many cycles ago; None for the base, which was there before cycle 0."""
        return self.earlier[-back].adapter if len(self.earlier) >= back else None

    def model(self, adapter: Path | None) -> Any:
        """The model with an adapter, where the Trainer would have it, in evaluation mode."""
        asked = self.trainer().get("accelerator", "auto")
        gpu = torch.cuda.is_available() and asked in ("auto", "gpu", "cuda")
        return self.slot.put(adapter).to(f"cuda:{torch.cuda.current_device()}" if gpu else "cpu")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase: settings, the files that it reads and leaves, and what it does."""

    stage: ClassVar[str]
    every_rank: ClassVar[bool] = False
    leaves: ClassVar[Mapping[str, str]] = {}
    not_settings: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse settings of another type."""
        check_types(self, type(self).__name__)

    @property
    def title(self) -> str:
        """Its name in a cycle's run."""
        return self.stage

    def settings(self) -> dict[str, Any]:
        """What of it decides the results, as plain values."""
        return plain_settings(self, without=self.not_settings)

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """What it depends on besides settings: files, or digests."""
        return {}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it, or go on in the folder as a kill left it; returns plain values."""
        raise NotImplementedError

    def after(self, context: CycleContext, folder: Path) -> CycleContext:
        """What the next phase sees."""
        left: dict[str, Any] = {name: folder / file for name, file in self.leaves.items()}
        return replace(context, **left)


def numbered(phases: Sequence[Phase]) -> dict[str, Phase]:
    """Phases by name, with a number behind the second of its kind and those after it."""
    found: dict[str, Phase] = {}
    for phase in phases:
        count = sum(other.title == phase.title for other in found.values())
        found[f"{phase.title}-{count + 1}" if count else phase.title] = phase
    return found


@contextmanager
def shown(bar: Bars | None, title: str, total: float) -> Iterator[Callable[[float], object]]:
    """Show a bar, if there are bars; gives the function that moves it on."""
    if bar is None:
        yield lambda steps: None
    else:
        with bar(title, total) as one:
            yield one.advance


_ADAM = {"betas": (0.9, 0.95)}
_SFT = {"lr": 1.5e-4, "warmup_fraction": 0.05, "weight_decay": 0.01, **_ADAM}
_DOCUMENTS = {**_SFT, "weight_decay": 0.1}
_DPO = {"lr": 1e-5, "schedule": "cosine", **_ADAM}
_CHAT = {"temperature": 0.8, "max_new_tokens": 1024}
_PAIRS: dict[str, Any] = {
    "chain": {"cycles": 5, "match_templates": True, "system_prompt": ""},
    "generate": {"n": 512, **_CHAT},
    "fit": {"beta": 0.1, "batch_size": 2, "optimisation": _DPO},
    "n_seed": 100,
}
PRESETS: dict[str, dict[str, Any]] = {
    "sft": {
        "chain": {"cycles": 7, "init": "reinit", "match_templates": False},
        "generate": {"n": 50, **_CHAT},
        "fit": {"batch_size": 2, "max_length": 8192, "optimisation": _SFT},
        "n_seed": 16,
    },
    "documents": {
        "chain": {"cycles": 7, "init": "reinit"},
        "generate": {"n": 50, "temperature": 0.8, "max_new_tokens": 512},
        "fit": {"batch_size": 4, "max_length": 8192, "clip": 1.0, "optimisation": _DOCUMENTS},
        "n_seed": 40,
    },
    "dpo": _PAIRS | {"chain": {**_PAIRS["chain"], "init": "reinit"}},
    "dpo_continual": _PAIRS | {"chain": {**_PAIRS["chain"], "init": "continual"}},
}
"""Settings of Roe et al. 2026 (arXiv 2605.01130) for models of 1B to 235B parameters, as their scripts have them.

Of each grid one value is here: ``n`` rows a cycle and ``n_seed`` rows of the seed, which they calibrate for each trait.
The scale of the adapter (alpha) is their service's default; how often documents were continued is not known.
"""
