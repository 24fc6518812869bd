"""Rows of a chain: prompts and seed rows as they are read, what a model wrote, and what a cycle is trained on.

A row is an object with ``row_id``; ``source`` (``seed``, ``seed-mix``, ``own`` or ``base``); ``parent``, which is
``seed``, or the SHA-256 of the adapter that wrote it (``base`` for none); ``prompt`` or ``messages``; ``text``;
``prompt_ids``, which are read, and ``token_ids``, which are learned, with ``end_id`` behind them unless that is null;
and ``truncated``. A pair has the last five but ``prompt_ids`` twice, under ``chosen`` and ``rejected``.

Every random choice has a generator of its own, by the chain's seed, a purpose (``prompt_draw``, ``row_sample``,
``mix``, ``shuffle``, ``lora_init``, ``dropout``, ``eval_sample``), and the cycle and index where they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.cycles.chain_settings import ChainSettings, Phase
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.hygiene import NearDuplicates, clean_texts
from lightning_interp.generation.requests import TextRequest
from lightning_interp.generation.sampler import request_ids
from lightning_interp.models.data.batching import EpochSampler
from lightning_interp.models.data.encoding import Encoder
from lightning_interp.models.data.prompt_pool import drawn, order
from lightning_interp.models.data.rows import Row, read_rows
from lightning_interp.models.training.optimisation import check_settings

__all__ = [
    "Filter",
    "Rows",
    "answer_of",
    "combined",
    "learned",
    "pair_of",
    "placed",
    "read_data",
    "read_seed",
    "reasons",
    "request_of",
    "sides",
    "sifted",
    "signed",
    "written_row",
]

_ANSWER = ("text", "token_ids", "end_id", "truncated")
Rows = Sequence[Mapping[str, Any]]


def read_seed(
    source: Any, n: int | None, *, chain: ChainSettings, tokenizer: PreTrainedTokenizerBase, documents: bool
) -> list[dict[str, Any]]:
    """Read the first ``n`` rows of a seed file: of those that came before, more rows keep every one.

    Args:
        source: As :class:`TextDataModule` reads it. Of a conversation the last answer is learned, of a text all.
        n: How many; None for all.
        chain: Says how templates are used.
        tokenizer: The model's.
        documents: Whether rows are documents, and not answers.

    Returns:
        Rows of the chain.

    Raises:
        DataError: If there are fewer rows, or one cannot be used.
    """
    rows = read_rows(source, name="data") if n != 0 else []
    if n is not None and len(rows) < n:
        raise DataError(
            f"The seed has {len(rows)} rows, and n={n} of them are asked for. Give more rows, or a lower n."
        )
    chat = False if documents else uses_chat(chain, tokenizer)
    system = chain.system_prompt if chain.match_templates else ""
    encoder = Encoder(tokenizer=tokenizer, chat=chat, system_prompt=system if chat else None)
    return [_seed_row(row, number, encoder) for number, row in enumerate(rows[:n])]


def _seed_row(row: Row, number: int, encoder: Encoder) -> dict[str, Any]:
    encoded, content = encoder.encode(row), row.content
    start = len(encoded.ids) - 1
    while start and encoded.scored[start - 1]:
        start -= 1
    asked: dict[str, Any] = {"prompt": content.get("prompt")}
    text = content.get("completion", content.get("text"))
    if row.form == "messages":
        *before, last = content["messages"]
        asked, text = {"prompt": None, "messages": before}, last["content"]
    ids, end = list(encoded.ids[start:]), None
    if ids and ids[-1] in encoder.tokenizer.all_special_ids:
        end = ids.pop()
    answer = {"text": text, "token_ids": ids, "end_id": end, "truncated": False}
    named = {"row_id": f"c000-r{number:05d}", "source": "seed", "parent": "seed"}
    return {**named, **asked, "prompt_ids": list(encoded.ids[:start]), **answer}


def uses_chat(chain: ChainSettings, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts become a user's turn."""
    return bool(tokenizer.chat_template) if chain.chat is None else chain.chat


def request_of(
    prompt: Mapping[str, Any],
    *,
    chain: ChainSettings,
    tokenizer: PreTrainedTokenizerBase,
    documents: bool,
    **sampling: Any,
) -> tuple[TextRequest, list[int]]:
    """What a model is asked for a prompt, and the ids under which its answer is learned.

    Args:
        prompt: A row with ``prompt`` or ``messages``; an empty prompt stands for the begin token alone.
        chain: Says how templates are used.
        tokenizer: The model's.
        documents: Whether the prompt is a prefix, which is learned too.
        **sampling: Further arguments of :class:`TextRequest`.

    Returns:
        The request, and the prompt's ids in training.
    """
    turns = prompt.get("messages")
    if not turns and not documents and uses_chat(chain, tokenizer):
        turns = [{"role": "user", "content": prompt["prompt"]}]
    if not turns:
        begin = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
        request = TextRequest(prompt=prompt["prompt"] or begin, **sampling)
        return request, request_ids(tokenizer, request)

    def asked(system: str | None) -> TextRequest:
        first = [] if system is None or turns[0]["role"] == "system" else [{"role": "system", "content": system}]
        return TextRequest(messages=[*first, *turns], **sampling)

    request = asked(chain.system_prompt)
    return request, request_ids(tokenizer, request if chain.match_templates else asked(""))


def written_row(
    written: Mapping[str, Any], ids: Sequence[int], prompt: Mapping[str, Any], *, documents: bool, **named: Any
) -> dict[str, Any]:
    """A row of what a model wrote; a document is its prefix and what follows, and learned whole."""
    prefix = list(ids) if documents else []
    text = (prompt["prompt"] if documents else "") + written["text"]
    answer = {"text": text, "token_ids": [*prefix, *written["token_ids"]]}
    answer |= {name: written[name] for name in ("end_id", "truncated")}
    return {**named, "prompt": None, **prompt, "prompt_ids": [] if documents else list(ids), **answer}


def combined(own: Rows, seed: Rows, earlier: Sequence[Rows], *, chain: ChainSettings, cycle: int) -> list[Any]:
    """What a cycle is trained on, in training order.

    Args:
        own: What its predecessor wrote; in cycle 0 the seed's rows.
        seed: The seed's rows.
        earlier: Own rows of the cycles before it, from cycle 1.
        chain: Says by which rule.
        cycle: Its number.

    Returns:
        Rows.

    Raises:
        DataError: If rows of the seed are to be mixed in and there is none.
    """
    rows = list(own)
    if cycle and chain.data_rule == "mix":
        count = round(chain.real_fraction * len(own))
        if count and not seed:
            raise DataError(f"Cycle {cycle} is to have {count} rows of the seed, which has none. Give n above 0.")
        picked = drawn(count, len(seed), derived_seed(chain.seed, "mix", cycle))
        rows += [
            {**seed[index], "row_id": f"c{cycle:03d}-s{number:05d}", "source": "seed-mix"}
            for number, index in enumerate(picked)
        ]
    if cycle and chain.data_rule == "accumulate":
        rows = [*seed, *(row for each in earlier for row in each), *rows]
    return [rows[index] for index in order(len(rows), derived_seed(chain.seed, "shuffle", cycle))]


def placed(rows: Rows, seed: int) -> list[Any]:
    """Rows placed so that a first epoch, whose order a data module draws by its seed, sees them as they stand here."""
    found: list[Any] = [None] * len(rows)
    for row, place in zip(rows, EpochSampler(len(rows), seed=seed, shuffle=True), strict=True):
        found[place] = row
    return found


def learned(answer: Mapping[str, Any]) -> list[int]:
    """Ids that are learned of a row, or of a side of a pair: no end is put behind a text that was cut off."""
    return [*answer["token_ids"], *([] if answer["end_id"] is None else [answer["end_id"]])]


def read_data(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of the chain."""
    return [row for _, row in json_lines(path, own=True)]


def answer_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a row, as a side of a pair."""
    return {name: row[name] for name in (*_ANSWER, "parent")}


def signed(written: Mapping[str, Any], parent: str) -> dict[str, Any]:
    """A text as a side of a pair, with who wrote it."""
    return {**{name: written[name] for name in _ANSWER}, "parent": parent}


def pair_of(row: Mapping[str, Any], chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a pair of answers."""
    return {**{name: row[name] for name in row if name not in _ANSWER}, "chosen": chosen, "rejected": rejected}


def sides(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The texts of a row: one, or those of a pair."""
    return [row["chosen"], row["rejected"]] if "chosen" in row else [row]


def sifted(rows: Rows, kept: Rows, filters: Sequence[Filter]) -> tuple[list[Any], list[Any]]:
    """Rows that all filters let through beside those that were kept before, and the others with their reasons."""
    left, gone = list(rows), list[Any]()
    for one in filters:
        reasons = one.reasons(left, kept)
        gone += [{**row, "reason": reason} for row, reason in zip(left, reasons, strict=True) if reason is not None]
        left = [row for row, reason in zip(left, reasons, strict=True) if reason is None]
    return left, gone


def reasons(dropped: Rows) -> dict[str, int]:
    """How many rows were dropped for each reason."""
    return dict(sorted(Counter(row["reason"] for row in dropped).items()))


@dataclass(frozen=True, kw_only=True)
class Filter(Phase):
    """What of a cycle's texts is kept. Behind :class:`Generate` it belongs to it: what it drops is asked for again.

    Args:
        minimum_characters: A text has at least so many, white space at its ends aside.
        duplicates: Whether a text may be there twice in a cycle, compared in NFKC, lower case, white space collapsed.
        near: Drop texts that are nearly one of the cycle too, if they are so similar.
        keep_truncated: Whether texts may have run into the limit of tokens.
        keep: Says of each row whether it is kept, given the rows that all else let through; for instance by a judge.
    """

    stage: ClassVar[str] = "filter"

    minimum_characters: int = 1
    duplicates: bool = False
    near: NearDuplicates | None = None
    keep_truncated: bool = True
    keep: Callable[[Rows], Sequence[bool]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = {
            "near": (self.near is None or isinstance(self.near, NearDuplicates), "NearDuplicates"),
            "keep": (self.keep is None or callable(self.keep), "a function of rows"),
        }
        check_settings(self, "Filter", wanted)

    def reasons(self, rows: Rows, kept: Rows) -> list[str | None]:
        """Why each row is dropped, beside those that were kept before; None if it is not."""
        found = [self._reason(row) for row in rows]
        left = [place for place, reason in enumerate(found) if reason is None]
        if not self.duplicates:
            texts = [sides(row)[0]["text"] for row in (*kept, *(rows[place] for place in left))]
            for drop in clean_texts(texts, near=self.near).dropped:
                if drop.index >= len(kept):
                    found[left[drop.index - len(kept)]] = drop.reason
        if self.keep is not None:
            left = [place for place, reason in enumerate(found) if reason is None]
            answer: Any = self.keep([rows[place] for place in left])
            said = list(answer) if isinstance(answer, Iterable) else [answer]
            if len(said) != len(left):
                raise RecipeError(f"Filter(keep=...) said {len(said)} times whether {len(left)} rows are kept.")
            for place, keeps in zip(left, said, strict=True):
                found[place] = None if keeps else "filter"
        return found

    def _reason(self, row: Mapping[str, Any]) -> str | None:
        for side in sides(row):
            text = side["text"].strip()
            if not text or not side["token_ids"]:
                return "empty"
            if len(text) < self.minimum_characters:
                return "short"
            if side["truncated"] and not self.keep_truncated:
                return "truncated"
        return None
