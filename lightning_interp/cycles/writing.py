"""Phases in which models write: the seed's rows and, for pairs, what is rejected; and a cycle's own rows.

They leave ``gen/`` (shards), ``rows.jsonl`` and ``dropped.jsonl``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.faults import die_here
from lightning_interp.core.storage.files import digest, sha256_file
from lightning_interp.core.storage.jsonl import write_json_lines
from lightning_interp.cycles.chain_rows import (
    Filter,
    Rows,
    answer_of,
    pair_of,
    read_seed,
    reasons,
    request_of,
    sides,
    sifted,
    signed,
    written_row,
)
from lightning_interp.cycles.chain_settings import CycleContext, Phase, shown
from lightning_interp.errors import DataError, InterpError, RecipeError
from lightning_interp.generation.requests import TextGenerator, TextRequest
from lightning_interp.generation.sampler import LocalSampler
from lightning_interp.generation.shards import read_shards, write_shards
from lightning_interp.models.training.optimisation import check_settings

__all__ = ["Generate", "Seed", "filtered"]

PEFT = "peft"  # beside an adapter's file: the same as a folder of PEFT


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
        super().__post_init__()
        TextRequest(prompt="?", temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)
        wanted = {
            "prompts": (self.prompts is None or isinstance(self.prompts, Iterable | Path), "a file or prompts"),
            "filters": (isinstance(self.filters, Sequence), "Filters"),
            "n": (self.n >= 1, "at least 1"),
            "draw": (self.draw in ("auto", "slice", "sample"), "auto, slice or sample"),
            "shortfall": (self.shortfall in ("more", "accept", "fail"), "more, accept or fail"),
            "slices": (self.slices is None or self.slices >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
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


def filtered(phases: Sequence[Phase]) -> list[Phase]:
    """Phases with each filter put into the writing before it."""
    found: list[Phase] = []
    for phase, before in zip(phases, [None, *phases], strict=False):
        if not isinstance(phase, Filter):
            found.append(phase)
            continue
        if not found or not isinstance(found[-1], Generate):
            raise RecipeError("A Filter stands behind no Generate; what it drops could not be asked for again.")
        earlier = found[-1].filters if isinstance(before, Filter) else ()
        found[-1] = replace(found[-1], filters=(*earlier, phase))
    return found


def _sha(adapter: Path | None) -> str:
    """What rows say of who wrote them."""
    return "base" if adapter is None else sha256_file(adapter)


def _write_rows(folder: Path, rows: Rows, dropped: Rows) -> None:
    write_json_lines(folder / "dropped.jsonl", dropped)
    write_json_lines(folder / "rows.jsonl", rows)
