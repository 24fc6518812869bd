"""Results of a judge that costs something, kept in a folder, so that a run that goes on asks for none of them twice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_interp.core.storage.distributed import rank_and_world_size
from lightning_interp.core.storage.files import digest, jsonable
from lightning_interp.errors import DataError
from lightning_interp.generation.judging.verdicts import JudgeResult, TraitJudge
from lightning_interp.generation.keyed_store import KeyedStore, KeyedWriter

__all__ = ["KeptJudge"]


@dataclass(frozen=True)
class _Kept:
    """A result under the digest of the judge and of what it judged."""

    key: str
    result: JudgeResult
    title = "a judgement"

    @property
    def told(self) -> tuple[str | None, str] | None:
        return None if self.result.status == "error" else (str(self.result.score), self.result.status)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = jsonable({"key": self.key, **asdict(self.result)}, nan_as_null=True)
        return found


class _Store(KeyedStore[_Kept]):
    file = "judged.jsonl"

    def find(self, key: str) -> JudgeResult | None:
        """The result of a key; None if there is none, or judging it went wrong."""
        found = self._found.get(key)
        return None if found is None or found.told is None else found.result

    def _read(self, row: Mapping[str, Any], where: str) -> _Kept:
        try:
            return _Kept(str(row["key"]), JudgeResult(row["score"], row["status"], row["detail"]))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{where}: no result of a judge ({error!r}). Delete the line; it is asked again."
            ) from error


class KeptJudge(TraitJudge):
    """Asks a judge once for each text and prompt, and keeps its results in a folder, a batch at a time.

    A result is found again by the judge's identity and what was judged. Where judging went wrong it is asked again.

    Args:
        judge: The judge.
        folder: The folder; each process has a file of its own in it.
        batch_size: Texts that are judged before their results are written.

    Example:
        >>> import tempfile
        >>> from lightning_interp.generation.judging.lexicon import Facet, LexiconJudge
        >>> judge = KeptJudge(LexiconJudge({"words": Facet(words=["luck"])}), tempfile.mkdtemp())
        >>> judge.score(["Luck!", "Work."]).tolist()
        [100.0, 0.0]
    """

    def __init__(self, judge: TraitJudge, folder: str | os.PathLike[str], *, batch_size: int = 16) -> None:
        self.judge, self.name, self.version, self.batch_size = judge, judge.name, judge.version, batch_size
        self._store = _Store(folder)

    def identity(self) -> dict[str, Any]:
        """That of the judge: where its results are kept decides nothing."""
        return self.judge.identity()

    def judged(self, texts: list[str], prompts: list[str]) -> list[JudgeResult]:
        """Find results, and ask for those that are missing."""
        who, items = self.judge.identity(), list(zip(texts, prompts, strict=True))
        keys = [digest([who, text, prompt]) for text, prompt in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if self._store.find(key) is None}
        found: dict[str, JudgeResult] = {}
        if missing:
            rank, processes = rank_and_world_size()
            waiting = list(missing)
            with KeyedWriter(self._store, shard=rank if processes > 1 else None) as writer:
                for part in (waiting[i : i + self.batch_size] for i in range(0, len(waiting), self.batch_size)):
                    asked, about = ([missing[key][at] for key in part] for at in (0, 1))
                    results = self.judge.results(asked, about)
                    writer.append([_Kept(*pair) for pair in zip(part, results, strict=True)])
                    found |= zip(part, results, strict=True)
        return [found.get(key) or self._store.find(key) or JudgeResult(None, "error") for key in keys]
