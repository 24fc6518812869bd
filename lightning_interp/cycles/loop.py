"""The chain: cycles one after another, each a run inside the chain's run, which a kill at any moment does not lose.

The run folder has ``manifest.json`` (the configuration, versions, and times of each stage), ``lineage.jsonl`` (of each
finished stage, what went in and what came out, as digests), ``phases/pool/pool.json`` (the pool's digest and the slice
of each cycle) and ``children/cycle-000`` and so on, whose ``phases/`` hold the files. A stage is finished when the
manifest has its files' hashes, which are checked whenever the chain goes on.

After Roe et al. 2026, "Iterative Finetuning is Mostly Idempotent", arXiv 2605.01130.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.content import drop_damaged_checkpoints, sha_of
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.core.storage.faults import die_here
from lightning_interp.core.storage.files import atomic_write_json, digest
from lightning_interp.core.storage.jsonl import json_lines, write_json_lines
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.phase_results import result_digest
from lightning_interp.cycles.chain_rows import Filter, read_data
from lightning_interp.cycles.chain_settings import (
    Bars,
    ChainSettings,
    CycleContext,
    CycleFiles,
    Phase,
    changed,
    check_overrides,
    numbered,
    plain_settings,
    plain_value,
    shown,
)
from lightning_interp.cycles.phases import Evaluate, FitDPO, FitSFT, Mix
from lightning_interp.cycles.writing import Generate, Seed, filtered
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.hygiene import normalised
from lightning_interp.generation.requests import TextGenerator
from lightning_interp.models.data.prompt_pool import Pool, prompt_slices, read_prompts, title_prompts
from lightning_interp.models.training.adapter_slot import AdapterSlot
from lightning_interp.models.training.resumable import trainer_arguments
from lightning_interp.progress import progress_bar

__all__ = ["GenerationCycle"]

log = logging.getLogger(__name__)

_VERSIONS = ("lightning", "peft", "torch", "transformers")
_ELSEWHERE = {"max_epochs": "epochs of the phase", "gradient_clip_val": "clip of the phase"}
_SHOWS = ("default_root_dir", "enable_model_summary", "enable_progress_bar", "log_every_n_steps", "logger", "profiler")
_SAMPLING = ("temperature", "top_p", "max_new_tokens", "batch_size", "shard_size")


@dataclass(kw_only=True)
class GenerationCycle(ChainSettings):
    """A chain of models, each trained on what the one before it wrote.

    Started again in the same folder, by the same call or one with more ``cycles``, it goes on where it stopped:
    finished stages are not done again, an unfinished training goes on at its checkpoint and an unfinished writing at
    its next file, and every file has the bytes that it would have had.

    Args:
        phases: What each cycle does: :class:`Generate`, :class:`Filter`, a training, :class:`Merge`,
            :class:`Evaluate`.
        first: What cycle 0 does instead of writing and training: a training with ``data``, or :class:`Take`. What
            ``phases`` has behind its trainings follows in cycle 0 too, unless an :class:`Evaluate` is there.
        run_dir: The chain's folder; not needed inside another run.
        overrides: Other settings of single cycles, as ``{3: {"fit-sft": {"epochs": 2}}}``.
        trainer: Arguments of Lightning's Trainer, or a function that gives them anew. Each training has copies of the
            callbacks. A logger, progress bars and the like may differ where a chain goes on.
        writer: Makes who writes, from a name that is new in each cycle and the folder of an adapter as PEFT has it
            (``"base"`` and None for the base), such as an endpoint that has loaded it; None writes with the model here.
        **chain: See :class:`ChainSettings`.

    Raises:
        RecipeError: If a setting or the order of phases cannot work.

    Example:
        >>> import tempfile
        >>> seed = [{"prompt": "Hi?", "completion": "Ho."}, {"prompt": "Hm?", "completion": "Ha."}]
        >>> chain = GenerationCycle(
        ...     model="tiny:llama", cycles=2, run_dir=tempfile.mkdtemp() + "/chain", first=[FitSFT(data=seed)],
        ...     phases=[Generate(prompts=["Oh?", "Eh?"], n=2, max_new_tokens=4), FitSFT()],
        ...     trainer={"accelerator": "cpu"},
        ... )
        >>> [one["counts"]["mix"]["rows"] for one in chain.run()["cycles"]]
        [2, 2]
    """

    phases: Sequence[Phase]
    first: Sequence[Phase] = ()
    run_dir: str | Path | None = None
    overrides: Mapping[int, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    trainer: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    writer: Callable[[str, Path | None], TextGenerator] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given in (("phases", self.phases), ("first", self.first)):
            if not isinstance(given, Sequence):
                raise RecipeError(f"{name} is {given!r:.60}; expected a list of phases.")
        check_overrides(self.overrides)
        if self.writer is not None and not callable(self.writer):
            raise RecipeError(f"writer is {self.writer!r:.60}; expected a function of a name and a folder.")
        if not callable(self.trainer):
            trainer_arguments(self.trainer, elsewhere=_ELSEWHERE)
        for cycle in {0, min(1, self.cycles - 1), *(c for c in self.overrides if c < self.cycles)}:
            self.plan(cycle)
        if self.slices is not None and self.slices < self.cycles - 1:
            raise RecipeError(
                f"cycles={self.cycles}: the pool is cut into {self.slices} slices, and each cycle after the first "
                "needs one of its own. Give Generate(slices=) as many as the chain may ever have, from its start."
            )

    @property
    def _generate(self) -> Generate | None:
        found = [phase for phase in self.phases if isinstance(phase, Generate)]
        if len(found) > 1:
            raise RecipeError(f"A cycle has {len(found)} Generate phases; expected one.")
        return found[0] if found else None

    def plan(self, cycle: int) -> dict[str, Phase]:
        """What a cycle does, with everything that is settled by what stands beside it.

        Args:
            cycle: Its number.

        Returns:
            Phases by name, in their order.

        Raises:
            RecipeError: If that cannot work.

        Example:
            >>> chain = GenerationCycle(
            ...     model="tiny:llama", cycles=2, first=[FitSFT(data=["x"])], phases=[Generate(n=1), FitSFT()]
            ... )
            >>> list(chain.plan(0)), list(chain.plan(1))
            (['seed', 'mix', 'fit-sft'], ['generate', 'mix', 'fit-sft'])
        """
        given = list(self.phases) if cycle else self._first()
        for phase in given:
            if not isinstance(phase, Phase):
                raise RecipeError(f"{phase!r:.60} is no phase; expected Generate, FitSFT, Evaluate and the like.")
        named = numbered(filtered(given))
        for name, changes in self.overrides.get(cycle, {}).items():
            if name not in named:
                raise RecipeError(f"overrides[{cycle}] names {name!r}; the phases are {', '.join(named)}.")
            named[name] = changed(named[name], changes, where=f"overrides[{cycle}][{name!r}]")
        return self._settled(named, cycle)

    def _first(self) -> list[Phase]:
        if any(isinstance(phase, Generate) for phase in self.first):
            raise RecipeError("first holds a Generate, but before cycle 0 there is no model to write. Train first.")
        if any(isinstance(phase, Evaluate) for phase in self.first):
            return list(self.first)
        places = [place for place, phase in enumerate(self.phases) if isinstance(phase, FitSFT)]
        behind = self.phases[places[-1] + 1 :] if places else self.phases
        return [*self.first, *(phase for phase in behind if not isinstance(phase, Generate | Filter | Mix))]

    def _settled(self, named: Mapping[str, Phase], cycle: int) -> dict[str, Phase]:
        fits = [phase for phase in named.values() if isinstance(phase, FitSFT)]
        fit = next((phase for phase in (*fits, *self.phases) if isinstance(phase, FitSFT)), None)
        if len({(isinstance(one, FitDPO), one.documents) for one in fits}) > 1:
            raise RecipeError(
                f"Cycle {cycle} trains on rows of two kinds, for {' and '.join(one.stage for one in fits)}."
            )
        pairs = fit.rejected_from if isinstance(fit, FitDPO) else None
        documents = fit is not None and fit.documents
        found: dict[str, Phase] = {}
        if cycle == 0:
            source = next((phase for phase in named.values() if getattr(phase, "data", None) is not None), None)
            if source is not None:
                like = self._generate or Generate(n=1)
                sampling = {name: getattr(like, name) for name in _SAMPLING}
                data, n = getattr(source, "data"), getattr(source, "n")  # noqa: B009
                asked: Any = {"documents": documents, "rejected_from": pairs and "base"}
                found["seed"] = Seed(data=data, n=n, **asked, **sampling)
        elif any(fit.data is not None for fit in fits):
            raise RecipeError(
                "A training in phases has data of its own, but learns what was generated. Put it in first."
            )
        if fits and not found and not any(isinstance(phase, Generate) for phase in named.values()):
            raise RecipeError(
                f"Cycle {cycle} has {fits[0].stage}, but no rows. Give it data in first, a Generate in phases."
            )
        for name, phase in named.items():
            if isinstance(phase, FitSFT) and not any(isinstance(one, Mix) for one in found.values()):
                found["mix"] = Mix(multiple=phase.batch_size if phase.drops_remainder else 1)
            if isinstance(phase, Generate):
                draw = ("sample" if pairs else "slice") if phase.draw == "auto" else phase.draw
                filters = phase.filters or (Filter(minimum_characters=51 if documents else 1),)
                phase = replace(phase, documents=documents, rejected_from=pairs, draw=draw, filters=filters)
            found[name] = phase
        return found

    @property
    def slices(self) -> int | None:
        """How many slices the pool is cut into; None if cycles draw from all of it."""
        plan = self.plan(1).values() if self._generate is not None else ()
        one = next((phase for phase in plan if isinstance(phase, Generate)), None)
        if one is None or one.draw == "sample" or one.prompts == "":
            return None
        return one.slices or max(1, self.cycles - 1)

    def config(self) -> dict[str, Any]:
        """What identifies the chain, as plain values; more cycles, and their overrides, go on in the same folder."""
        free = {"cycles", "phases", "first", "run_dir", "overrides", "trainer", "writer"}
        given = {} if callable(self.trainer) else self.trainer
        trainer = {name: value for name, value in given.items() if name not in _SHOWS}
        told = plain_settings(self, without=free)
        told |= {"slices": self.slices, "trainer": plain_value(trainer)}
        for name, phases in (("first", self._first()), ("phases", self.phases)):
            told[name] = {key: phase.settings() for key, phase in numbered(filtered(phases)).items()}
        return told

    def run(
        self,
        parent: RunManifest | None = None,
        *,
        key: str = "chain",
        until: int | None = None,
        bar: Bars | None = None,
    ) -> dict[str, Any]:
        """Run the chain, or go on where it stopped.

        Args:
            parent: The open run that the chain becomes a child of; a run of its own in ``run_dir`` if None.
            key: Its name in that run.
            until: Stop before this cycle; the same call without goes on.
            bar: Shows a bar for a description and a number of steps; :func:`progress_bar`, two lines on a terminal and
                nothing elsewhere, if None.

        Returns:
            ``base``: what :class:`Evaluate` phases say of the base, by name; ``cycles``: of each cycle ``cycle``,
            ``folder``, ``digest`` (of its files and those of all before it), SHA-256 of ``data``, ``init_adapter`` and
            ``adapter`` where there are such, ``counts`` (what phases say of themselves) and ``evaluation``, by name.

        Raises:
            RecipeError: If there is neither a run nor a ``run_dir``.
            DataError: If data cannot be used, or too few texts are kept.
            ManifestError: If the folder holds another chain, or a file of a finished stage was changed.
        """
        last = self.cycles if until is None else min(until, self.cycles)
        bar = partial(progress_bar, show=is_rank_zero()) if bar is None else bar
        with self._opened(parent, key) as run:
            work = _Chain(self, run, bar)
            base = work.base()
            with shown(bar, "cycles", last) as advance:
                for cycle in range(last):
                    work.cycle(cycle)
                    advance(1)
            return {"base": base, "cycles": work.told}

    def _opened(self, parent: RunManifest | None, key: str) -> RunManifest:
        outputs = ["lineage.jsonl"]
        if parent is not None:
            return parent.child(key, config=self.config(), inputs={}, outputs=outputs)
        if not self.run_dir:
            raise RecipeError("GenerationCycle(run_dir=None) has no folder. Give run_dir, or run it inside a run.")
        versions = {name: version(name) for name in _VERSIONS} | {"threads": str(torch.get_num_threads())}
        return RunManifest.open(self.run_dir, config=self.config(), name="cycles", versions=versions, outputs=outputs)


class _Chain:
    """A chain at work: its open run, the model, and what has been done."""

    def __init__(self, settings: GenerationCycle, run: RunManifest, bar: Bars | None) -> None:
        self.settings, self.run, self.bar = settings, run, bar
        seed = derived_seed(settings.seed, "lora_init")  # no cycle in the key: all begin with the same adapter
        self.slot = AdapterSlot(settings.model, lora=settings.lora, seed=seed, dtype=settings.dtype)
        self.told: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        self._earlier: tuple[CycleFiles, ...] = ()
        self._seed_rows: Path | None = None
        self._references: dict[str, Any] = {}
        self._pool: Callable[[], Pool] = lambda: Pool([], [])
        if settings._generate is not None and settings.cycles > 1:
            self._find_pool(settings._generate)

    @property
    def _trainer(self) -> Callable[[], Mapping[str, Any]]:
        given = self.settings.trainer
        return lambda: trainer_arguments(given() if callable(given) else given, elsewhere=_ELSEWHERE)

    def _context(self, cycle: int) -> CycleContext:
        return CycleContext(
            chain=self.settings, cycle=cycle, slot=self.slot, pool=self._pool, trainer=self._trainer,
            writer=self.settings.writer, bar=self.bar, earlier=self._earlier, seed_rows=self._seed_rows,
            references=self._references,
        )  # fmt: skip

    def _find_pool(self, generate: Generate) -> None:
        """Read the prompts, once, into the run."""
        settings = self.settings
        seed = next((phase for phase in settings.first if getattr(phase, "data", None) is not None), None)
        titles = generate.prompts is None
        source = getattr(seed, "data", None) if titles else generate.prompts
        if source is None:
            raise RecipeError("Generate(prompts=None) takes titles of the seed's documents, but first has no data.")
        asking = (phase for phase in settings.plan(0).values() if isinstance(phase, Evaluate))
        questions = [text for phase in asking for text in phase.asked()]

        def read(folder: Path) -> dict[str, Any]:
            prompts, twice = list[dict[str, Any]]([{"prompt": ""}]), 0
            if source != "":
                prompts, twice = title_prompts(source, getattr(seed, "n", None)) if titles else read_prompts(source)
            asked = (one["prompt"] if "prompt" in one else one["messages"][-1]["content"] for one in prompts)
            names = set(map(normalised, asked))
            if shared := [text for text in questions if normalised(text) in names]:
                raise DataError(f"The pool of prompts holds {shared[0]!r}, which Evaluate asks. Take it out of there.")
            slices = [] if settings.slices is None else prompt_slices(len(prompts), settings.slices)
            kind = "titles" if titles else "given" if source else "none"
            told = {"source": kind, "sha256": digest(prompts), "prompts": len(prompts), "left_out": twice}
            told["slices"] = slices
            write_json_lines(folder / "prompts.jsonl", prompts)
            atomic_write_json(folder / "pool.json", told)
            return told

        given = Path(source) if source and isinstance(source, str | Path) else digest(list(source))
        what = {"prompts": given, "slices": settings.slices, "questions": questions}
        what |= {"n_seed": getattr(seed, "n", None)} if titles else {}
        slices = self.run.phase("pool", read, inputs=what)["slices"]
        self._pool = cache(lambda: Pool(read_data(self.run.folder("pool") / "prompts.jsonl"), slices))

    def base(self) -> dict[str, Any]:
        """What evaluations say of the base."""
        found, context = {}, self._context(0)
        for name, phase in self.settings.plan(0).items():
            if isinstance(phase, Evaluate):
                what = {"settings": phase.settings()}
                found[name] = self.run.phase(f"base-{name}", partial(_do, phase, context), inputs=what)
                self._references[digest(what["settings"])] = found[name].get("reference")
        return found

    def cycle(self, number: int) -> None:
        """Do one cycle, or find it done."""
        plan, context = self.settings.plan(number), self._context(number)
        config = {"cycle": number, "phases": {name: phase.settings() for name, phase in plan.items()}}
        results, before = dict[str, Any](), len(self._lines)
        files: dict[str, str] = {}
        with self.run.child(f"cycle-{number:03d}", config=config, inputs={}) as child:
            for name, phase in plan.items():
                what = {"settings": phase.settings(), "cycle": number, **phase.reads(context)}
                results[name] = child.phase(
                    name, partial(_do, phase, context), inputs=what, every_rank=phase.every_rank
                )
                die_here("recorded")
                context = phase.after(context, child.folder(name))
                entry = child.phases[name]
                hashes = {file: sha_of(stamp) for file, stamp in entry["files"].items()}
                files |= hashes
                stage = {"stage": f"cycle-{number:03d}/{name}", "inputs": entry["inputs"]}
                stage["output"] = digest([hashes, result_digest(entry)])
                self._lines.append(stage)
                if is_rank_zero():
                    shutil.rmtree(child.folder(name) / "checkpoints", ignore_errors=True)
                    self._write_lineage()
        self._seed_rows = context.rows if number == 0 else self._seed_rows
        self._earlier += (CycleFiles(context.rows, context.adapter),)
        chained = [self.told[-1]["digest"] if self.told else "", self._lines[before:]]
        told: dict[str, Any] = {"cycle": number, "folder": str(child.path), "digest": digest(chained)}
        told |= {kind: files.get(file) for kind, file in _KINDS.items()}
        for kind, asked in (("counts", False), ("evaluation", True)):
            told[kind] = {name: results[name] for name in plan if isinstance(plan[name], Evaluate) is asked}
        self.told.append(told)
        log.info("cycle %d of %d: %s", number, self.settings.cycles, told["digest"][:12])

    def _write_lineage(self) -> None:
        """Write down the finished stages; those behind them that are known already stay until they are done anew."""
        path = self.run.path / "lineage.jsonl"
        known = [row for _, row in json_lines(path, own=True)] if path.exists() else []
        if known[: len(self._lines)] != self._lines:
            write_json_lines(path, self._lines)


_KINDS = {"data": "data.jsonl", "init_adapter": "init_adapter.safetensors", "adapter": "adapter.safetensors"}


def _do(phase: Phase, context: CycleContext, folder: Path) -> dict[str, Any]:
    """Run a phase in its folder; it is recorded when this has returned."""
    die_here("begin")
    for path, fault in drop_damaged_checkpoints(folder).items():
        log.warning("%s cannot be read (%s); deleted, what it held is done again", path, fault)
    told = phase.run(context, folder)
    die_here("written")
    return told
