"""Number sequences from a teacher, on disk: written, filtered, counted, and found again by a run that was killed."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.files import atomic_write_json, digest, jsonable
from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.core.storage.jsonl import json_lines, write_json_lines
from lightning_interp.core.storage.manifest_file import config_difference
from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation.completion_store import CompletionStore, write_all
from lightning_interp.generation.requests import Completion
from lightning_interp.subliminal.number_prompts import PromptSettings, number_prompt
from lightning_interp.subliminal.numbers import parse_numbers, rejections
from lightning_interp.subliminal.teachers import Teacher

__all__ = ["NumberDataset", "NumberSettings", "identical_share", "paired_rows", "read_numbers", "write_numbers"]

Strategy = Literal["filtered", "raw"]
_ROWS, _MANIFEST, _STORE = "rows.jsonl", "manifest.json", "completions"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class NumberSettings:
    """How a data set of numbers is made.

    Args:
        rows: Valid rows that are wanted.
        strategy: ``"filtered"`` asks for batch after batch until there are as many; ``"raw"`` asks ``raw_rows`` times
            and draws ``rows`` of those that are valid.
        batch_rows: Requests of a batch, for ``"filtered"``; no more than ``rows``.
        max_batches: Batches at most.
        raw_rows: Requests, for ``"raw"``.
        prompts: What requests look like; how many numbers of how many digits are asked for is what the filter allows.
        temperature: Of sampling; there is no top-k or top-p and no penalty.
        max_new_tokens: Tokens of an answer.
        banned: Numbers that may not occur.
        lenient: Leave out white space around an answer.
        seed: Of requests and random numbers.
        subsample_seed: Of the draw from ``"raw"`` rows.

    Raises:
        RecipeError: If a count is below 1, the strategy is unknown, or ``"raw"`` cannot give as many rows.
    """

    rows: int = 10_000
    strategy: Strategy = "filtered"
    batch_rows: int = 2_000
    max_batches: int = 100
    raw_rows: int = 30_000
    prompts: PromptSettings = field(default_factory=PromptSettings)
    temperature: float = 1.0
    max_new_tokens: int = 200
    banned: tuple[int, ...] = ()
    lenient: bool = False
    seed: int = 42
    subsample_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "batch_rows", "max_batches", "raw_rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"NumberSettings({name}={getattr(self, name)!r}): expected at least 1.")
        if self.strategy not in get_args(Strategy):
            known = ", ".join(get_args(Strategy))
            raise RecipeError(f"NumberSettings(strategy={self.strategy!r}): expected one of {known}.")
        if self.strategy == "raw" and self.raw_rows < self.rows:
            raise RecipeError(
                f"NumberSettings(rows={self.rows}, raw_rows={self.raw_rows}): expected at least as many raw rows."
            )

    def reasons(self, answer: Completion) -> list[str]:
        """Why an answer is not used: ``no_text``, ``unfinished``, or as :func:`rejections` says."""
        if answer.text is None:
            return ["no_text"]
        most = {"max_count": self.prompts.answer_count, "max_value": 10**self.prompts.answer_max_digits - 1}
        found: list[str] = list(rejections(answer.text, banned=self.banned, lenient=self.lenient, **most))
        return found + ["unfinished"] * (answer.status != "complete")


class NumberDataset(NamedTuple):
    """Rows of a teacher, and how they came about.

    Each row has ``index``, ``prompt``, ``completion``, ``numbers``, ``constrained``, and ``tokens`` (the ids that a
    local model wrote). Rows of one index answer the same request with the same random numbers in every data set of the
    same settings.
    """

    rows: list[dict[str, Any]]
    manifest: dict[str, Any]


def write_numbers(
    teacher: Teacher,
    folder: str | os.PathLike[str],
    *,
    settings: NumberSettings | None = None,
    against: str | os.PathLike[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> NumberDataset:
    """Let a teacher write number sequences; a run that was killed goes on where it was.

    Args:
        teacher: Who writes.
        folder: Gets ``rows.jsonl``, ``manifest.json``, and all answers in ``completions/``.
        settings: How many, of what kind; the defaults of :class:`NumberSettings` if None.
        against: Folder of a data set with the same requests, such as the control's: what is identical is counted.
        progress: Called with the number of answers that were just written.

    Returns:
        What was written.

    Raises:
        DataError: If no answer is valid, the writer gives up, one that is said to be constrained is not, or the other
            data set has other requests.
        ManifestError: If the folder holds another data set.

    Warns:
        UserWarning: If there are fewer valid rows than wanted.
    """
    settings, path = settings or NumberSettings(), Path(folder)
    asked = jsonable({"teacher": _told(teacher), "settings": asdict(settings), "sampler": _sampler(settings)})
    _check_same(path, asked)
    other = None if against is None else _same_requests(Path(against), settings)
    answers = _answers(teacher, settings, CompletionStore(path / _STORE), progress)
    reasons = {index: settings.reasons(answer) for index, answer in answers.items()}
    valid = [index for index, found in reasons.items() if not found]
    counts = Counter(reason for found in reasons.values() for reason in found)
    _check_valid(teacher, answers, reasons, counts)
    kept = _kept(settings, valid)
    rows = [_row(teacher, settings, index, answers[index]) for index in kept]
    done = {"asked": len(answers), "valid": len(valid), "kept": len(rows), "yield": len(valid) / len(answers)}
    manifest = {"v": _FORMAT, **asked, **done, "reasons": dict(counts), "constrained": teacher.constrained}
    manifest["against"] = None if other is None else _compared(rows, other)
    write_json_lines(path / _ROWS, rows)
    atomic_write_json(path / _MANIFEST, manifest)
    if len(rows) < settings.rows:
        warnings.warn(
            f"{teacher.name!r} has written {len(rows)} valid rows of the {settings.rows} that are wanted, in "
            f"{len(answers)} answers ({_commonest(counts)}). Allow more max_batches or raw_rows.",
            stacklevel=2,
        )
    return NumberDataset(rows, manifest)


def read_numbers(folder: str | os.PathLike[str]) -> NumberDataset:
    """Read what :func:`write_numbers` wrote.

    Args:
        folder: Its folder.

    Returns:
        Rows and manifest.

    Raises:
        DataError: If there is none, or a file cannot be read.
    """
    path = Path(folder)
    if not (path / _MANIFEST).exists():
        raise DataError(
            f"{str(path)!r} holds no data set of numbers: there is no {_MANIFEST}. Use write_numbers first."
        )
    return NumberDataset([row for _, row in json_lines(path / _ROWS, own=True)], read_json(path / _MANIFEST))


def paired_rows(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of two data sets that answer the same requests, in the same order.

    Args:
        first: Rows of one, such as the teacher's.
        second: Rows of the other, such as the control's.

    Returns:
        As many rows of each.

    Raises:
        DataError: If they have no request in common, or rows of one index have another prompt.
    """
    there = {row["index"]: row for row in second}
    pairs = [(dict(row), dict(there[row["index"]])) for row in first if row["index"] in there]
    if not pairs or any(one["prompt"] != other["prompt"] for one, other in pairs):
        raise DataError(
            f"{len(first)} and {len(second)} rows cannot be paired: {len(pairs)} have an index in common, and the "
            "prompts of those must be the same. Write both with the same settings."
        )
    return [one for one, _ in pairs], [other for _, other in pairs]


def identical_share(first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]]) -> float:
    """Share of places at which texts agree, of all places that one of the two has.

    Args:
        first: Token ids (or characters) of each text.
        second: Those of the texts that they are compared with.

    Returns:
        Between 0 and 1; NaN without any.

    Example:
        >>> identical_share([[1, 2, 3], [4]], [[1, 9, 3, 5], [4]])
        0.6
    """
    equal = sum(one == other for a, b in zip(first, second, strict=True) for one, other in zip(a, b, strict=False))
    places = sum(max(len(a), len(b)) for a, b in zip(first, second, strict=True))
    return equal / places if places else float("nan")


def _answers(
    teacher: Teacher, settings: NumberSettings, store: CompletionStore, progress: Callable[[int], object] | None
) -> dict[int, Completion]:
    """Answers by row: batches until enough are valid, or all raw ones."""
    size = settings.raw_rows if settings.strategy == "raw" else min(settings.batch_rows, settings.rows)
    answers: dict[int, Completion] = {}
    for number in range(1 if settings.strategy == "raw" else settings.max_batches):
        indices = range(number * size, (number + 1) * size)
        requests = [_request(teacher, settings, index) for index in indices]
        report = write_all(teacher.writer, requests, store, progress=progress)
        if report.stopped is not None:
            raise DataError(
                f"{teacher.name!r} stopped writing: {report.missing} of {len(requests)} answers are missing "
                f"({report.last_error or report.stopped}). Start again, and it goes on from there."
            )
        answers |= zip(indices, store.completions(teacher.writer, requests), strict=True)
        if sum(not settings.reasons(answer) for answer in answers.values()) >= settings.rows:
            break
    return answers


def _request(teacher: Teacher, settings: NumberSettings, index: int) -> Any:
    prompt = number_prompt(settings.prompts, seed=settings.seed, index=index)
    sampling = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    return teacher.request(prompt, index=index, seed=settings.seed, **sampling)


def _row(teacher: Teacher, settings: NumberSettings, index: int, answer: Completion) -> dict[str, Any]:
    text = answer.text or ""
    prompt = number_prompt(settings.prompts, seed=settings.seed, index=index)
    return {
        "index": index,
        "prompt": prompt,
        "completion": text.strip() if settings.lenient else text,
        "numbers": parse_numbers(text, lenient=settings.lenient),
        "constrained": teacher.constrained,
        "tokens": list(answer.token_ids),
    }


def _kept(settings: NumberSettings, valid: Sequence[int]) -> list[int]:
    """The first valid rows; of raw ones a draw in which each row has its own lot, so that two data sets share many."""
    if settings.strategy == "filtered":
        return sorted(valid)[: settings.rows]
    lots = sorted(valid, key=lambda index: derived_seed(settings.subsample_seed, "subsample", index))
    return sorted(lots[: settings.rows])


def _check_valid(
    teacher: Teacher, answers: Mapping[int, Completion], reasons: Mapping[int, list[str]], counts: Counter[str]
) -> None:
    refused = [answers[index].text for index, found in reasons.items() if found]
    examples = " and ".join(f"{text!r:.80}" for text in refused[:2])
    if teacher.constrained and refused:
        raise DataError(
            f"{teacher.name!r} is said to be constrained, but {len(refused)} of its {len(answers)} answers are no "
            f"valid lists ({_commonest(counts)}), such as {examples}. Let its grammar and the settings agree."
        )
    if len(refused) == len(answers):
        raise DataError(
            f"None of the {len(answers)} answers of {teacher.name!r} is a list of numbers ({_commonest(counts)}), "
            f"such as {examples}. Use constrained decoding (NumberGrammar), a stronger model, or lenient=True."
        )


def _commonest(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common(3)) or "all are valid"


def _told(teacher: Teacher) -> dict[str, Any]:
    """The teacher as plain values."""
    context = {"system": teacher.context.system, "user_prefix": teacher.context.user_prefix}
    writer = dict(teacher.writer.identity())
    return {"name": teacher.name, "kind": teacher.kind, "trait": teacher.trait.target, **context, "writer": writer}


def _sampler(settings: NumberSettings) -> dict[str, Any]:
    off = {"top_p": 1.0, "top_k": None, "repetition_penalty": 1.0}
    return {"temperature": settings.temperature, **off, "max_new_tokens": settings.max_new_tokens, "seeds": "one a row"}


def _check_same(path: Path, asked: Mapping[str, Any]) -> None:
    """Refuse a folder in which another data set lies."""
    if not (path / _MANIFEST).exists():
        return
    there = {key: value for key, value in read_json(path / _MANIFEST).items() if key in asked}
    if digest(there) != digest(asked):
        differing = "; ".join(config_difference(there, asked)[:4])
        raise ManifestError(
            f"{str(path)!r} holds another data set of numbers ({differing}). Choose another folder, or delete it."
        )


def _same_requests(path: Path, settings: NumberSettings) -> NumberDataset:
    """The data set that is compared with; one with other requests cannot be."""
    other = read_numbers(path)
    there, now = other.manifest["settings"], jsonable(asdict(settings))
    keys = ("prompts", "seed", "temperature")
    if digest([there[key] for key in keys]) != digest([now[key] for key in keys]):
        differing = "; ".join(config_difference({k: there[k] for k in keys}, {k: now[k] for k in keys}))
        raise DataError(
            f"{str(path)!r} has other requests ({differing}), so that nothing can be compared row by row. Write both "
            "with the same settings."
        )
    return other


def _compared(rows: Sequence[Mapping[str, Any]], other: NumberDataset) -> dict[str, Any]:
    """How much of the rows is the same as in the other data set."""
    pairs = {row["index"]: row for row in other.rows}
    both = [(row, pairs[row["index"]]) for row in rows if row["index"] in pairs]
    unit = "tokens" if all(one["tokens"] and two["tokens"] for one, two in both) else "completion"
    share = identical_share([one[unit] for one, _ in both], [two[unit] for _, two in both])
    counts = {"rows": len(both), "of": "tokens" if unit == "tokens" else "characters"}
    same = sum(one["completion"] == two["completion"] for one, two in both)
    return {"teacher": other.manifest["teacher"]["name"], **counts, "identical": share, "identical_rows": same}
