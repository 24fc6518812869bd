"""Readers for texts of the user's own, and for files of the paper's authors: rewrites, rewards, batches, effects.

Reber et al., "RATE: Causal Explainability of Reward Models with Imperfect Counterfactuals", arXiv 2410.11348.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.jsonl import json_lines, json_object
from lightning_interp.core.storage.row_files import file_rows
from lightning_interp.errors import DataError
from lightning_interp.generation.batch_files import read_answers
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.assembly import Identical, Missing, assemble
from lightning_interp.rate.rewriting.records import (
    Request,
    RewriteRecord,
    RewriteResult,
    RewriterId,
    Unit,
    as_result,
    check_units,
    shown_ids,
)
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.scoring.rewards import MissingRewardError

__all__ = ["COLUMNS", "OWN_REWARDS", "ForeignRewrites", "read_batch", "read_effects", "read_own", "read_rewrites"]

_TEXTS = {"original": "original", "rewrite": "rewrite", "rewrite2": "rewritten rewrite"}  # our stage -> their key
_KNOWN = {"w_original", "completions", "reward_question"}
_ESTIMANDS = ("ATE", "ATT", "ATU")
_EFFECTS = ("naive_effect", *(f"{a}_{b}" for b in ("single_rewrite", "rewritten_rewrite") for a in _ESTIMANDS))

OWN_REWARDS = "columns"
"""Name under which the rewards of the file are found."""

_OWN = {"original": "reward", "rewrite": "reward_rewrite", "rewrite2": "reward_rewrite2"}
COLUMNS = ("text", "original", "prompt", "w", "id", "cluster", "rewrite", "rewrite2", *_OWN.values())
"""Keys that are looked at: ``text`` (or ``original``) is needed, the others are not."""


@dataclass(frozen=True, kw_only=True)
class ForeignRewrites:
    """Units with their rewrites by id (None where one is missing), and their rewards by model, id and stage."""

    units: list[Unit]
    texts: dict[str, tuple[str | None, str | None]]
    rewards: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    source: str = ""

    def triples(self, attr: str, *, missing: Missing = "raise", identical: Identical = "keep") -> RewriteTriples:
        """The complete units in the order of the file; see :func:`assemble` for what is missing or identical."""
        by = RewriterId(self.source, "", "")

        def walk(unit: Unit, draw: int) -> list[RewriteRecord | None]:
            return list(self._records(unit, attr, by))

        return assemble(attr, self.units, walk, missing=missing, identical=identical)

    def scores(self, model: str, triples: RewriteTriples) -> dict[str, list[float]]:
        """Rewards of one model for complete units: for each stage one a row."""
        if model not in self.rewards:
            raise MissingRewardError(
                f"{self.source} has no rewards of {model!r}; it has those of {', '.join(self.rewards) or 'no model'}. "
                "Name one of these."
            )
        found = self.rewards[model]
        for name in triples.ids:
            if lacking := [stage for stage in _TEXTS if stage not in found.get(name, {})]:
                raise MissingRewardError(
                    f"{self.source}: {model!r} has no reward of unit {name!r} for {', '.join(lacking)}. Score it, or "
                    "leave the unit out."
                )
        return {stage: [found[name][stage] for name in triples.ids] for stage in _TEXTS}

    def to_store(
        self, folder: str | os.PathLike[str], *, attr: str, rewriter: str, params: Any = None, instruction: str = ""
    ) -> RewriteStore:
        """Write the units and rewrites to a store; doing it again adds nothing."""
        store = RewriteStore.create(folder, self.units, attr=attr)
        by = RewriterId(rewriter, digest(params or {}), digest(instruction))
        found: dict[str, RewriteRecord] = {}
        labelled = [unit for unit in self.units if unit.w is not None]
        records = [record for unit in labelled for record in self._records(unit, attr, by) if record is not None]
        other = [one.id for one in records if found.setdefault(one.key, one).result.text != one.result.text]
        if other:
            warnings.warn(
                f"{self.source}: {len(other)} rewrites of a text that occurs twice differ, such as of unit "
                f"{shown_ids(other)}. A store keeps one rewrite for equal texts: the first in the file.",
                stacklevel=2,
            )
        with store.writer() as writer:
            writer.describe(by, params=params or {}, instruction=instruction)
            writer.append([record for record in found.values() if store.find(record.key) != record])
        return store

    def _records(self, unit: Unit, attr: str, by: RewriterId) -> Iterator[RewriteRecord | None]:
        """The passes of a unit as a store would hold them, up to the first that is missing."""
        source, target = unit.text, 1 - int(unit.w or 0)
        for number, text in enumerate(self.texts[unit.id], start=1):
            request = Request(unit=unit, attr=attr, number=number, draw=0, w_target=target, source=source, by=by)
            yield None if text is None else request.record(RewriteResult(text=text))
            if text is None or not text.strip():
                return
            source, target = text, 1 - target


def read_rewrites(path: str | os.PathLike[str]) -> ForeignRewrites:
    """Read the authors' file of rewrites, scored or not.

    A JSON object by id, or JSONL with one record a line, whose number (from 1) is its id. A record has ``w_original``,
    ``completions`` (``original``, ``rewrite``, ``rewritten rewrite``), ``reward_question`` (the prompt), and for each
    reward model a key with the rewards of the three texts.

    Args:
        path: A ``.json`` or ``.jsonl`` file.

    Returns:
        Units, texts and rewards.

    Raises:
        DataError: If the file cannot be read or a record is no such one; names file and line, or file and id.
    """
    return collected(path, (_given(name, row, where) for name, where, row in _records(Path(path))))


Given = tuple[Unit, tuple[str | None, str | None], Mapping[str, dict[str, float]]]
"""A unit, its two rewrites, and its rewards by model and stage."""


def collected(path: str | os.PathLike[str], rows: Iterable[Given]) -> ForeignRewrites:
    """What a file holds, of what its records hold."""
    units, texts = [], {}
    rewards: dict[str, dict[str, dict[str, float]]] = {}
    for unit, found, scores in rows:
        units.append(unit)
        texts[unit.id] = found
        for model, by_stage in scores.items():
            rewards.setdefault(model, {})[unit.id] = by_stage
    source = os.fspath(path)
    return ForeignRewrites(units=check_units(units, source), texts=texts, rewards=rewards, source=source)


def text_of(where: str, name: str, text: Any) -> str | None:
    """A text of a file, or None."""
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {name} is {text!r:.80}; expected a string.")
    return text


def number_of(where: str, name: str, value: Any) -> float:
    """A number of a file."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {name} is {value!r:.80}; expected a number.")
    return float(value)


def unit_of(where: str, **values: Any) -> Unit:
    """A unit of a file."""
    try:
        return Unit(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _records(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(id, where, record) of either form of the file."""
    if path.suffix == ".jsonl":
        for where, row in json_lines(path):
            yield where.rpartition(" ")[2], where, row
        return
    whole = _json(path, "JSON or JSONL file")
    for name, row in whole.items():
        where = f"{path}, id {name!r}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: {row!r:.80}; expected an object with w_original and completions.")
        yield name, where, row


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a {what}.") from error


def _given(name: str, row: Mapping[str, Any], where: str) -> Given:
    completions = row.get("completions")
    if not isinstance(completions, Mapping) or "w_original" not in row:
        raise DataError(f"{where}: the keys are {', '.join(row) or 'none'}; expected w_original and completions.")
    original, *texts = (text_of(where, f"completions[{key!r}]", completions.get(key)) for key in _TEXTS.values())
    if original is None:
        raise DataError(f"{where}: completions has no 'original'; expected the text that was rewritten.")
    unit = unit_of(where, id=name, text=original, w=row["w_original"], prompt=row.get("reward_question") or "")
    return unit, (texts[0], texts[1]), _scores(row, where)


def _scores(row: Mapping[str, Any], where: str) -> dict[str, dict[str, float]]:
    """Rewards by model and stage; whatever else a record holds is not looked at."""
    found = {}
    for model, scores in row.items():
        if model not in _KNOWN and isinstance(scores, Mapping) and set(scores) & set(_TEXTS.values()):
            given = {stage: scores[key] for stage, key in _TEXTS.items() if scores.get(key) is not None}
            found[model] = {
                stage: number_of(where, f"the reward of {model!r} for {stage}", value) for stage, value in given.items()
            }
    return found


def read_batch(
    requests: str | os.PathLike[str], *answers: str | os.PathLike[str]
) -> dict[str, tuple[str, RewriteResult | None]]:
    """Read a batch with its answers.

    Args:
        requests: JSONL of requests: ``custom_id``, ``method``, ``url`` and ``body`` with the messages.
        *answers: JSONL of answers.

    Returns:
        By ``custom_id``, the last message that was sent and the result; None where there is no answer.

    Raises:
        DataError: If a line is no request or answer, an id occurs twice, or an answer belongs to no request.
    """
    asked: dict[str, str] = {}
    for where, row in json_lines(requests):
        name, body = row.get("custom_id"), row.get("body")
        messages = body.get("messages") if isinstance(body, Mapping) else None
        listed = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
        if not isinstance(name, str) or not messages or not listed:
            raise DataError(f"{where}: custom_id is {name!r:.80}; expected a request with custom_id and body.messages.")
        if name in asked:
            raise DataError(f"{where}: custom_id {name!r} occurs above. Remove one of the lines.")
        asked[name] = str(messages[-1].get("content"))
    found: dict[str, RewriteResult] = {}
    for path in answers:
        found.update((key, as_result(answer)) for key, answer in read_answers(path).items())
    strange = [name for name in found if name not in asked]
    if strange:
        raise DataError(
            f"{len(strange)} answers belong to no request of {os.fspath(requests)}, such as {shown_ids(strange)}. Give "
            "the answers of this batch."
        )
    return {name: (text, found.get(name)) for name, text in asked.items()}


def read_effects(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the authors' file of effects.

    Args:
        path: A JSON file with ``naive_effect``, ``ATE_single_rewrite``, ..., each with its ``_stderr``.

    Returns:
        ``naive``, ``single`` and ``rate``: effects as ``(estimate, standard error)`` by estimand (``ATE``, ``ATT``,
        ``ATU``), ``naive`` alone; and ``reward_std``, ``n1`` and ``n0``.

    Raises:
        DataError: If the file cannot be read or lacks a value; names the key.
    """
    row = _json(Path(path), "JSON file of effects")
    wanted = (*_EFFECTS, *(f"{name}_stderr" for name in _EFFECTS), "reward_std", "Y1_count", "Y0_count")
    lacking = [key for key in wanted if isinstance(row.get(key), bool) or not isinstance(row.get(key), int | float)]
    if lacking:
        raise DataError(f"{os.fspath(path)} has no number for {', '.join(lacking)}. Give a file of effects.")
    pair = {name: (float(row[name]), float(row[f"{name}_stderr"])) for name in _EFFECTS}
    return {
        "naive": pair["naive_effect"],
        "single": {a: pair[f"{a}_single_rewrite"] for a in _ESTIMANDS},
        "rate": {a: pair[f"{a}_rewritten_rewrite"] for a in _ESTIMANDS},
        "reward_std": float(row["reward_std"]),
        "n1": int(row["Y1_count"]),
        "n0": int(row["Y0_count"]),
    }


def read_own(path: str | os.PathLike[str]) -> ForeignRewrites:
    r"""Read a file of the user's own: JSONL, a JSON list, CSV, TSV or Parquet, with the same rows in each.

    A row holds ``text`` (or ``original``), and may hold ``prompt``, ``w`` (0, 1 or null), ``id`` (else the row's
    number), ``cluster``, ``rewrite`` and ``rewrite2``, ``reward``, ``reward_rewrite`` and ``reward_rewrite2``. Other
    keys are not looked at, unless one is nearly the name of a known one.

    Args:
        path: The file.

    Returns:
        Units, texts and rewards; the rewards as those of the model :data:`OWN_REWARDS`.

    Raises:
        DataError: If the file cannot be read or a line cannot be used; names file and line.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = file.write_text('{"text": "A fine film!", "w": 1, "prompt": "Review it."}')
        >>> read_own(file).units[0].prompt
        'Review it.'
    """
    rows = file_rows(path, expected="rows with 'text'", numbers=("w", *_OWN.values()))
    return collected(path, (_own_given(row, where) for where, row in rows))


def _own_given(row: Mapping[str, Any], where: str) -> Given:
    for name in row:
        near = difflib.get_close_matches(name, [one for one in COLUMNS if one not in row], n=1, cutoff=0.85)
        if name not in COLUMNS and near:
            raise DataError(f"{where}: there is a key {name!r}; is {near[0]!r} meant? Rename one or the other.")
    given = [name for name in ("text", "original") if name in row]
    if len(given) != 1:
        raise DataError(
            f"{where}: the keys are {', '.join(row) or 'none'}; expected 'text' or 'original', and not both."
        )
    text, first, second = (text_of(where, repr(key), row.get(key)) for key in (*given, "rewrite", "rewrite2"))
    if text is None or not text.strip():
        raise DataError(f"{where}: {given[0]!r} is {text!r}; expected a text. Delete the line.")
    name, cluster = row.get("id", where.rpartition(" ")[2]), row.get("cluster")
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    cluster = str(cluster) if isinstance(cluster, int) else cluster
    unit = unit_of(where, id=name, text=text, w=row.get("w"), prompt=row.get("prompt") or "", cluster=cluster)
    scored = {stage: key for stage, key in _OWN.items() if row.get(key) is not None}
    scores = {stage: number_of(where, repr(key), row[key]) for stage, key in scored.items()}
    return unit, (first, second), {OWN_REWARDS: scores} if scores else {}
