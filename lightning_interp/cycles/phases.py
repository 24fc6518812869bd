"""What a cycle does, phase by phase: settings that run once, in a folder of their own, and leave files for the next.

A phase reads files and leaves files; which it reads, it says beforehand, so that a run knows whether it must be done
again. Training ones have a Trainer each. What the paper's run folder holds lies here: ``seed`` or ``generate`` (see
``writing``) has ``gen/``, ``rows.jsonl`` and ``dropped.jsonl``; ``mix`` has ``data.jsonl``; ``fit-*`` has
``init_adapter.safetensors``, ``adapter.safetensors``, ``metrics.jsonl``, ``reference.safetensors`` of pairs, the
checkpoint while it trains, and the adapter as a folder of PEFT; ``evaluate`` what its function writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.jsonl import write_json_lines
from lightning_interp.core.storage.tensor_files import read_tensors
from lightning_interp.cycles.chain_rows import Rows, combined, learned, placed, read_data
from lightning_interp.cycles.chain_settings import CycleContext, Phase, changed, shown
from lightning_interp.cycles.evaluation import TraitEvaluation
from lightning_interp.cycles.writing import PEFT
from lightning_interp.errors import DataError
from lightning_interp.models.data.dpo_pairs import DPODataModule
from lightning_interp.models.data.text_data import TextDataModule
from lightning_interp.models.sources.adapters import save_adapter
from lightning_interp.models.training.adapter_slot import AdapterSlot
from lightning_interp.models.training.causal_lm import CausalLM
from lightning_interp.models.training.dpo import DPO
from lightning_interp.models.training.dpo_loss import DPOSettings
from lightning_interp.models.training.loss_callback import StepLosses
from lightning_interp.models.training.optimisation import Optimisation, check_settings
from lightning_interp.models.training.resumable import fit_or_go_on

__all__ = ["Evaluate", "FitDPO", "FitDocuments", "FitSFT", "Merge", "Mix", "Take"]

ADAPTER = "adapter.safetensors"
_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
_BETAS = (0.9, 0.95)
_SFT = Optimisation(lr=1e-3, betas=_BETAS, warmup_fraction=0.05, weight_decay=0.01)
_DOCUMENTS = replace(_SFT, weight_decay=0.1)
_DPO = Optimisation(lr=3e-4, betas=_BETAS, schedule="cosine")


@dataclass(frozen=True, kw_only=True)
class Mix(Phase):
    """Puts together what a cycle is trained on, in training order, by the chain's rule; the chain adds it.

    Args:
        multiple: Rows at the end that do not fill such a batch are left out, unless there is no other.
    """

    stage: ClassVar[str] = "mix"
    leaves: ClassVar[Mapping[str, str]] = {"data": "data.jsonl"}

    multiple: int = 1

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        rule = context.chain.data_rule
        earlier = [one.rows for one in context.earlier[1:]] if rule == "accumulate" else []
        return {"rows": context.rows, "seed": None if rule == "replace" else context.seed_rows, "earlier": earlier}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        own = read_data(context.rows) if context.rows else []
        seed = read_data(context.seed_rows) if context.seed_rows else []
        earlier = [read_data(one.rows) for one in context.earlier[1:] if one.rows]
        rows = combined(own, seed, earlier, chain=context.chain, cycle=context.cycle)
        left_over = len(rows) % self.multiple if len(rows) > self.multiple else 0
        rows = rows[: len(rows) - left_over]
        write_json_lines(folder / "data.jsonl", rows)
        return {"rows": len(rows), "left_over": left_over, "sources": dict(Counter(row["source"] for row in rows))}


@dataclass(frozen=True, kw_only=True)
class FitSFT(Phase):
    """Trains on a cycle's rows with a Trainer of its own: the answers of chat rows.

    Args:
        data: In ``first``: the seed, as :class:`TextDataModule` reads it.
        n: In ``first``: rows of the seed, its first ones; all if None, and no training if 0.
        optimisation: How weights are trained.
        batch_size: Rows a step and device.
        epochs: Passes over the rows.
        max_length: Tokens a row may have.
        length_window: Batches among which rows of like length are put together, in an order that is not the file's; 0
            for none.
        clip: Largest norm of the gradient.
        checkpoint_every: Steps between checkpoints, at which a killed training goes on.
    """

    stage: ClassVar[str] = "fit-sft"
    every_rank: ClassVar[bool] = True
    leaves: ClassVar[Mapping[str, str]] = {"adapter": ADAPTER}
    not_settings: ClassVar[frozenset[str]] = frozenset({"data", "checkpoint_every"})
    documents: ClassVar[bool] = False
    drops_remainder: ClassVar[bool] = True

    data: Any = None
    n: int | None = None
    optimisation: Optimisation = _SFT
    batch_size: int = 2
    epochs: int = 1
    max_length: int = 1024
    length_window: int = 0
    clip: float | None = None
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if isinstance(self.optimisation, Mapping):
            usual = type(self).__dataclass_fields__["optimisation"].default
            given = changed(usual, self.optimisation, where=f"{name}(optimisation=...)")
            object.__setattr__(self, "optimisation", given)
        wanted = {
            "data": (self.data is None or isinstance(self.data, Iterable | Path), "a file or rows"),
            "optimisation": (isinstance(self.optimisation, Optimisation), "Optimisation"),
            "n": (self.n is None or self.n >= 0, "at least 0"),
            "length_window": (self.length_window >= 0, "at least 0"),
            "clip": (self.clip is None or self.clip > 0, "a number above 0"),
        }
        counts = ("batch_size", "epochs", "max_length", "checkpoint_every")
        check_settings(self, name, wanted | {one: (getattr(self, one) >= 1, "at least 1") for one in counts})

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        return {"data": context.data, "start": context.start}

    def parts(self, context: CycleContext, folder: Path, rows: Rows, seed: int) -> tuple[Any, Any]:
        """The module and its data, which sees the rows in their order."""
        given = [{"prompt_ids": row["prompt_ids"], "completion_ids": learned(row)} for row in rows]
        module = CausalLM(context.slot.model, **self._module(context))
        return module, TextDataModule(placed(given, seed), **self._data(context, seed))

    def _module(self, context: CycleContext) -> dict[str, Any]:
        seed = derived_seed(context.chain.seed, "dropout", context.cycle)
        return {"tokenizer": context.slot.tokenizer, "optimisation": self.optimisation, "seed": seed}

    def _data(self, context: CycleContext, seed: int) -> dict[str, Any]:
        how = {name: getattr(self, name) for name in ("batch_size", "max_length", "length_window")}
        return {"tokenizer": context.slot.tokenizer, "seed": seed, **how}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        rows, slot = read_data(context.data) if context.data else [], context.slot
        slot.put(context.start)
        if is_rank_zero():
            slot.save(folder / "init_adapter.safetensors")
        told: dict[str, Any] = {"rows": len(rows), "steps": 0}
        if rows:
            seed = derived_seed(context.chain.seed, "epochs", context.cycle)
            module, data = self.parts(context, folder, rows, seed)
            title = f"cycle {context.cycle}: training {folder.name}"
            watch = StepLosses(folder / "metrics.jsonl", lambda steps: shown(context.bar, title, steps))
            given: dict[str, Any] = {
                "max_epochs": self.epochs,
                "gradient_clip_val": self.clip,
                "log_every_n_steps": 1,
                **_QUIET,
            }
            given |= {"default_root_dir": folder, **context.trainer()}
            given["callbacks"] = [*given.get("callbacks", ()), watch]
            _, logged = fit_or_go_on(module, data, folder, given, every=self.checkpoint_every)
            steps = read_data(watch.path)[-1]["step"] if is_rank_zero() else 0  # forked processes tell it by the file
            told |= {"steps": steps, "logged": logged, "data": data.counts.get("train", {})}
        if is_rank_zero():
            _keep(slot, folder)
        return told


@dataclass(frozen=True, kw_only=True)
class FitDocuments(FitSFT):
    """Trains on documents: every token of them is learned.

    Args:
        packing: Several documents in one row, each of which reads itself alone.
    """

    stage: ClassVar[str] = "fit-documents"
    documents: ClassVar[bool] = True

    optimisation: Optimisation = _DOCUMENTS
    batch_size: int = 4
    clip: float | None = 1.0
    packing: bool = False

    def _data(self, context: CycleContext, seed: int) -> dict[str, Any]:
        return {**super()._data(context, seed), "packing": self.packing}


@dataclass(frozen=True, kw_only=True)
class FitDPO(FitSFT):
    """Trains to prefer the answers of the model before over those of another, as direct preference optimisation.

    Args:
        beta: How far the policy may go from its reference, which is the policy at the first step.
        rejected_from: Who writes what is rejected: the ``base``, or the model before the ``previous`` one (in the first
            two cycles the base).
        swap: Reject what was to be chosen: a control.
    """

    stage: ClassVar[str] = "fit-dpo"
    drops_remainder: ClassVar[bool] = False

    optimisation: Optimisation = _DPO
    batch_size: int = 4
    beta: float = 0.1
    rejected_from: Literal["base", "previous"] = "base"
    swap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        DPOSettings(beta=self.beta)
        wanted = {"rejected_from": (self.rejected_from in ("base", "previous"), "base or previous")}
        check_settings(self, "FitDPO", wanted)

    def parts(self, context: CycleContext, folder: Path, rows: Rows, seed: int) -> tuple[Any, Any]:
        """The module and its pairs; what the reference says of them lies in the folder, for other runs too."""
        sides = ("rejected", "chosen") if self.swap else ("chosen", "rejected")
        given = [
            {
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": learned(row[sides[0]]),
                "rejected_ids": learned(row[sides[1]]),
            }
            for row in rows
        ]
        module = DPO(context.slot.model, beta=self.beta, **self._module(context))
        reference = folder / "reference.safetensors"
        return module, DPODataModule(placed(given, seed), reference=reference, **self._data(context, seed))


@dataclass(frozen=True, kw_only=True)
class Merge(Phase):
    """Makes a cycle's model of the adapters until now.

    Args:
        merge: Gets the adapters of the cycles before, oldest first, and last this cycle's own; each as tensors by name.
            Returns the same names and shapes.
    """

    stage: ClassVar[str] = "merge"
    leaves: ClassVar[Mapping[str, str]] = {"adapter": ADAPTER}

    merge: Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]

    def __post_init__(self) -> None:
        check_settings(self, "Merge", {"merge": (callable(self.merge), "a function of adapters")})

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        return {"adapters": [one.adapter for one in context.earlier] + [context.adapter]}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        paths = [path for path in self.reads(context)["adapters"] if path is not None]
        merged = self.merge([read_tensors(path)[0] for path in paths])
        if not isinstance(merged, Mapping) or not all(isinstance(one, Tensor) for one in merged.values()):
            raise DataError(f"Merge(merge={self.settings()['merge']}) gave {merged!r:.60}; expected tensors by name.")
        return _taken(context, folder, dict(merged))


@dataclass(frozen=True, kw_only=True)
class Take(Phase):
    """Cycle 0 without a training: ``M_0`` is an adapter that was trained before, such as another chain's.

    Args:
        adapter: Its ``adapter.safetensors``.
        data: The seed that it has learned, where later cycles mix it in.
        n: Rows of the seed, its first ones.
    """

    stage: ClassVar[str] = "take"
    leaves: ClassVar[Mapping[str, str]] = {"adapter": ADAPTER}
    not_settings: ClassVar[frozenset[str]] = frozenset({"adapter", "data"})

    adapter: str | Path
    data: Any = None
    n: int | None = None

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        return {"adapter": Path(self.adapter)}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        return _taken(context, folder, read_tensors(self.adapter)[0])


@dataclass(frozen=True, kw_only=True)
class Evaluate(Phase):
    """Asks each cycle's model the same, with the same random numbers; and the base, once.

    Args:
        evaluate: Called with the model, its tokenizer, ``folder=`` (the phase's) and ``seed=``, which is the same in
            every cycle; returns plain values.
        name: What it is called, where there are several.
        prompts: What it asks; none of these may be in the pool of prompts. Those of ``evaluate`` if it has any.
    """

    stage: ClassVar[str] = "evaluate"
    not_settings: ClassVar[frozenset[str]] = frozenset({"prompts"})

    evaluate: Callable[..., Mapping[str, Any]]
    name: str = "evaluate"
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = {
            "evaluate": (callable(self.evaluate), "a function of a model and its tokenizer"),
            "name": (self.name not in ("seed", "mix"), "no name that the chain has for phases of its own"),
        }
        check_settings(self, "Evaluate", wanted)

    @property
    def title(self) -> str:
        """Its name."""
        return self.name

    def asked(self) -> Sequence[str]:
        """Prompts that must not be in the pool."""
        return [*self.prompts, *getattr(self.evaluate, "prompts", ())]

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        return {"adapter": context.adapter}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        model, seed = context.model(context.adapter), derived_seed(context.chain.seed, "eval_sample")
        more: dict[str, Any] = {}
        if isinstance(self.evaluate, TraitEvaluation):  # which would ask the base beside each model
            known = context.references.get(digest(self.settings()))
            more = {"base": model} if context.adapter is None else {"reference": known}
        with undisturbed(model):
            found = self.evaluate(model, context.slot.tokenizer, folder=folder, seed=seed, **more)
        if not isinstance(found, Mapping):
            raise DataError(f"{self.settings()['evaluate']} gave {found!r:.60}; expected plain values by name.")
        return dict(found)


def _taken(context: CycleContext, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    context.slot.put(tensors)
    _keep(context.slot, folder)
    return {"tensors": len(tensors)}


def _keep(slot: AdapterSlot, folder: Path) -> None:
    """Write the adapter as it is now, once for the chain and once for others to load."""
    slot.save(folder / ADAPTER)
    save_adapter(slot.model, folder / PEFT, base=slot.source, overwrite=True)
