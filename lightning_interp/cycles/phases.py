"""What a cycle does, phase by phase: settings that run once, in a folder of their own, and leave files for the next.

A phase reads files and leaves files; which it reads, it says beforehand, so that a run knows whether it must be done
again. Training ones have a Trainer each. What the paper's run folder holds lies here: ``seed`` or ``generate`` has
``gen/`` (shards), ``rows.jsonl`` and ``dropped.jsonl``; ``mix`` has ``data.jsonl``; ``fit-*`` has
``init_adapter.safetensors``, ``adapter.safetensors``, ``metrics.jsonl``, ``reference.safetensors`` of pairs, the
checkpoint while it trains, and the adapter as a folder of PEFT; ``evaluate`` what its function writes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.core.storage.faults import die_here
from lightning_interp.core.storage.files import digest, sha256_file
from lightning_interp.core.storage.jsonl import write_json_lines
from lightning_interp.core.storage.tensor_files import read_tensors
from lightning_interp.cycles.chain_rows import (
    Filter,
    Rows,
    answer_of,
    combined,
    learned,
    pair_of,
    placed,
    read_data,
    read_seed,
    reasons,
    request_of,
    sides,
    sifted,
    signed,
    written_row,
)
from lightning_interp.cycles.chain_settings import CycleContext, Phase, shown
from lightning_interp.errors import DataError, InterpError
from lightning_interp.generation.requests import TextGenerator, TextRequest
from lightning_interp.generation.sampler import LocalSampler
from lightning_interp.generation.shards import read_shards, write_shards
from lightning_interp.models.data.dpo_pairs import DPODataModule
from lightning_interp.models.data.text_data import TextDataModule
from lightning_interp.models.sources.adapters import save_adapter
from lightning_interp.models.training.adapter_slot import AdapterSlot
from lightning_interp.models.training.causal_lm import CausalLM
from lightning_interp.models.training.dpo import DPO
from lightning_interp.models.training.loss_callback import StepLosses
from lightning_interp.models.training.optimisation import Optimisation, check_settings
from lightning_interp.models.training.resumable import fit_or_go_on

__all__ = ["Evaluate", "FitDPO", "FitDocuments", "FitSFT", "Generate", "Merge", "Mix", "Seed", "Take"]

ADAPTER, PEFT = "adapter.safetensors", "peft"
_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
_BETAS = (0.9, 0.95)
_SFT = Optimisation(lr=1e-3, betas=_BETAS, warmup_fraction=0.05, weight_decay=0.01)
_DOCUMENTS = replace(_SFT, weight_decay=0.1)
_DPO = Optimisation(lr=3e-4, betas=_BETAS, schedule="cosine")


@dataclass(frozen=True, kw_only=True)
class _Writing(Phase):
    """Phases in which models write rows."""

    leaves: ClassVar[Mapping[str, str]] = {"rows": "rows.jsonl"}

    documents: bool = False
    rejected_from: str | None = None
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 64
    batch_size: int = 16
    shard_size: int = 64

    def other(self, context: CycleContext) -> Path | None:
        """Who writes what is rejected: the model of two cycles ago, or the base."""
        return context.author(2) if self.rejected_from == "previous" else None

    def write(
        self, context: CycleContext, adapter: Path | None, asked: Mapping[str, Any], folder: Path, *side: str
    ) -> list[dict[str, Any]]:
        """Texts to prompts by row id, with token ids; a row without an answer has an empty text."""
        tokenizer, chain = context.slot.tokenizer, context.chain
        how = {"chain": chain, "tokenizer": tokenizer, "documents": self.documents}
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "max_new_tokens")}
        requests, ids = dict[str, TextRequest](), dict[str, list[int]]()
        for name, (key, prompt) in asked.items():
            request, ids[name] = request_of(
                prompt, seed=chain.seed, key=("row_sample", context.cycle, *key, *side), **sampling, **how
            )
            requests[name] = request
        writer = self._writer(context, adapter)
        with shown(
            context.bar, f"cycle {context.cycle}: writing {folder.parent.name}/{folder.name}", len(asked)
        ) as advance:

            def shard(rows: int) -> None:
                die_here("shard")
                advance(rows)

            report = write_shards(
                writer, requests, folder, shard_size=self.shard_size, tokenizer=tokenizer, progress=shard,
                keep_failed=context.writer is None,  # a model fails where a prompt is too long, and will again
            )  # fmt: skip
        if not report.complete:
            raise InterpError(
                f"{report.missing} of {len(asked)} texts of {str(folder)!r} are missing, because the writer failed "
                f"({report.last_error!r}). Repair it and start the chain again: it goes on from that shard."
            )
        found = []
        for row in read_shards(folder):
            one = row.completion
            text, tokens, end = one.text or "", list(one.token_ids), one.end_id
            if text and not tokens:  # of an endpoint, which tells no ids
                tokens = list(tokenizer(text, add_special_tokens=False).input_ids)
                end = tokenizer.eos_token_id if one.status == "complete" else None
            found.append(
                {"text": text, "token_ids": tokens, "end_id": end, "truncated": row.truncated, "ids": ids[row.row_id]}
            )
        return found

    def _writer(self, context: CycleContext, adapter: Path | None) -> TextGenerator:
        if context.writer is not None:
            named = "base" if adapter is None else next(part for part in adapter.parts[::-1] if part[:6] == "cycle-")
            return context.writer(named, None if adapter is None else adapter.parent / PEFT)
        return LocalSampler(context.model(adapter), context.slot.tokenizer, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Seed(_Writing):
    """Rows of the seed, of which cycle 0 learns; made by the chain from ``data`` and ``n`` of its first training.

    With ``rejected_from`` the base answers the same prompts, for pairs.
    """

    stage: ClassVar[str] = "seed"
    not_settings: ClassVar[frozenset[str]] = frozenset({"data"})

    data: Any = None
    n: int | None = None

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        data = self.data
        return {"data": Path(data) if isinstance(data, str | Path) else digest(list(data or ()))}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        rows: Any = []
        if self.data is not None:
            how = {"chain": context.chain, "tokenizer": context.slot.tokenizer, "documents": self.documents}
            rows = read_seed(self.data, self.n, **how)
        counts: dict[str, Any] = {"rows": len(rows)}
        dropped: list[Any] = []
        if self.rejected_from is not None and rows:
            asked = {row["row_id"]: ((place,), row) for place, row in enumerate(rows)}
            other = self.write(context, None, asked, folder / "gen/rejected", "rejected")
            rows = [pair_of(row, answer_of(row), signed(text, "base")) for row, text in zip(rows, other, strict=True)]
            rows, dropped = sifted(rows, [], [Filter(duplicates=True)])
            counts |= {"rows": len(rows), "dropped": reasons(dropped)}
            if not rows:
                raise DataError(f"None of the {len(dropped)} rows of the seed makes a pair: {reasons(dropped)}.")
        _write_rows(folder, rows, dropped)
        return counts


@dataclass(frozen=True, kw_only=True)
class Generate(_Writing):
    """The model of the cycle before answers prompts; what is kept are this cycle's own rows.

    Args:
        prompts: A file or list of prompts, or of prefixes of documents; see :func:`read_prompts`. For documents also
            None, the titles of seed rows that cycle 0 does not learn from, which carry the seed's topics on; or
            ``""``, no prefix.
        n: Rows to keep.
        draw: Whether each cycle has a contiguous slice of the pool for itself, in its order, or a random sample of all
            of it; by default the second for pairs.
        slices: How many slices; one for each cycle after the first if None. Give as many as the chain may ever have.
        shortfall: If fewer than ``n`` are kept: ask more prompts of the same slice, keep what there is, or fail.
        filters: What is kept; by default what is neither empty nor a duplicate, of documents with more than 50
            characters.
        documents, rejected_from: Set by the chain, from the training that follows.
        temperature, top_p, max_new_tokens: How tokens are drawn.
        batch_size: Rows at once. Like ``shard_size``, rows of a file, it settles which rows are rounded together.

    Raises:
        RecipeError: If a value is out of range.
    """

    stage: ClassVar[str] = "generate"
    not_settings: ClassVar[frozenset[str]] = frozenset({"prompts", "slices"})

    prompts: Any = None
    n: int
    draw: Literal["auto", "slice", "sample"] = "auto"
    slices: int | None = None
    shortfall: Literal["more", "accept", "fail"] = "more"
    filters: tuple[Filter, ...] = ()

    def __post_init__(self) -> None:
        wanted = {
            "n": (self.n >= 1, "at least 1"),
            "draw": (self.draw in ("auto", "slice", "sample"), "auto, slice or sample"),
            "shortfall": (self.shortfall in ("more", "accept", "fail"), "more, accept or fail"),
            "shard_size": (self.shard_size >= 1, "at least 1"),
        }
        check_settings(self, "Generate", wanted)

    def author(self, context: CycleContext) -> Path | None:
        """Whose rows they are."""
        return None if context.chain.generator == "base" else context.author()

    def asked(self, context: CycleContext) -> list[tuple[tuple[int, ...], Mapping[str, Any]]]:
        """A cycle's prompts in the order in which they are asked, each with the key of its random numbers.

        Of documents several passes, where a slice has fewer prefixes than rows are wanted.
        """
        pool, found, times = context.pool(), list[Any](), Counter[int]()
        passes = 1 if not self.documents else 1 + math.ceil(self.n * max(1, len(pool.slices)) / len(pool.prompts))
        seed = derived_seed(context.chain.seed, "prompt_draw", context.cycle)
        for index in pool.drawn(context.cycle - 1, seed=seed, passes=passes):
            key = (index, times[index]) if times[index] else (index,)
            times[index] += 1
            found.append((key, pool.prompts[index]))
        return found

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        author, prompts = self.author(context), [list(one) for one in self.asked(context)]
        return {"prompts": digest(prompts), "author": author, "other": self.other(context)}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        left, kept, dropped, count = self.asked(context), list[Any](), list[Any](), 0
        for number in range(len(left)):
            take, left = left[: self.n - len(kept)], left[self.n - len(kept) :]
            rows = self._round(context, folder / f"gen/round-{number:02d}", take, count)
            count += len(take)
            more, gone = sifted(rows, kept, self.filters)
            kept, dropped = kept + more, dropped + gone
            if len(kept) == self.n or not left or self.shortfall != "more":
                break
        what = f"Cycle {context.cycle} kept {len(kept)} of {count} texts, and n={self.n}: {reasons(dropped)}"
        if not kept or (len(kept) < self.n and self.shortfall != "accept"):
            hint = "Give more prompts, other filters, or a lower n" + ("." if not kept else ", or shortfall='accept'.")
            raise DataError(f"{what}; its slice has {len(left)} more prompts. {hint}")
        _write_rows(folder, kept, dropped)
        cut = sum(side["truncated"] for row in kept for side in sides(row))
        return {"asked": count, "rows": len(kept), "dropped": reasons(dropped), "truncated": cut}

    def _round(self, context: CycleContext, folder: Path, take: Sequence[Any], count: int) -> list[dict[str, Any]]:
        asked = {f"c{context.cycle:03d}-r{count + place:05d}": one for place, one in enumerate(take)}
        author, rows = self.author(context), list[dict[str, Any]]()
        mine, parent = self.write(context, author, asked, folder / "own"), _sha(author)
        source = "base" if author is None else "own"
        for (name, (_, prompt)), text in zip(asked.items(), mine, strict=True):
            named = {"row_id": name, "source": source, "parent": parent}
            rows.append(written_row(text, text["ids"], prompt, documents=self.documents, **named))
        if self.rejected_from is None:
            return rows
        other = self.other(context)
        theirs, parent = self.write(context, other, asked, folder / "rejected", "rejected"), _sha(other)
        return [pair_of(row, answer_of(row), signed(text, parent)) for row, text in zip(rows, theirs, strict=True)]


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

    def reads(self, context: CycleContext) -> dict[str, Any]:
        """Its files."""
        return {"adapters": [one.adapter for one in context.earlier] + [context.adapter]}

    def run(self, context: CycleContext, folder: Path) -> dict[str, Any]:
        """Do it."""
        paths = [path for path in self.reads(context)["adapters"] if path is not None]
        return _taken(context, folder, self.merge([read_tensors(path)[0] for path in paths]))


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
        with undisturbed(model):
            return dict(self.evaluate(model, context.slot.tokenizer, folder=folder, seed=seed))


def _taken(context: CycleContext, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    context.slot.put(tensors)
    _keep(context.slot, folder)
    return {"tensors": len(tensors)}


def _keep(slot: AdapterSlot, folder: Path) -> None:
    """Write the adapter as it is now, once for the chain and once for others to load."""
    slot.save(folder / ADAPTER)
    save_adapter(slot.model, folder / PEFT, base=slot.source, overwrite=True)


def _sha(adapter: Path | None) -> str:
    """What rows say of who wrote them."""
    return "base" if adapter is None else sha256_file(adapter)


def _write_rows(folder: Path, rows: Rows, dropped: Rows) -> None:
    write_json_lines(folder / "dropped.jsonl", dropped)
    write_json_lines(folder / "rows.jsonl", rows)
