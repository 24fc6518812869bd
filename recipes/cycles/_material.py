"""What a chain is made of and asked, checked before any training: seed, prompts, questions, and who judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_interp.core.measure.statistics import counted
from lightning_interp.core.model.fingerprint import tensor_hash
from lightning_interp.core.storage.files import atomic_write_bytes
from lightning_interp.cycles import TraitEvaluation
from lightning_interp.errors import DataError
from lightning_interp.generation import Facet, LexiconJudge
from lightning_interp.models.data.prompt_pool import normalised, read_prompts
from lightning_interp.models.data.rows import read_rows
from lightning_interp.models.training.lora import adapter_parameters


@dataclass(frozen=True)
class Material:
    """Sources of the seed (with its number of rows) and of prompts, questions, and who judges."""

    seed: Any
    rows: int
    prompts: Any
    questions: list[str]
    judge: Any


def material_of(recipe: Any) -> Material:
    """Read what a recipe is given or brings, and refuse what a chain could not be made of."""
    usual = recipe.defaults()
    seed, prompts = recipe.seed_data or usual["seed"], recipe.prompts or usual["prompts"]
    asked = read_prompts(recipe.questions)[0] if recipe.questions else [{"prompt": one} for one in usual["questions"]]
    questions = [one["prompt"] for one in asked if "prompt" in one][: 3 if recipe.smoke else None]
    rows = [row.content for row in read_rows(seed, name="seed_data")]
    if recipe.n_seed > len(rows):
        where = _named(recipe.seed_data, "the seed")
        raise DataError(f"n_seed={recipe.n_seed}: {where} has {counted(len(rows), 'row')}. Give fewer.")
    if prompts:
        _check_prompts(recipe, [_text(row) for row in read_prompts(prompts)[0]], questions)
    elif prompts is None and (left := len(rows) - max(recipe.n_seed, recipe.largest_seed)) < recipe.slices:
        raise DataError(
            f"{_named(recipe.seed_data, 'The seed')} has {len(rows)} documents, of which cycle 0 may learn "
            f"{len(rows) - left}, and {recipe.slices} more are needed for their titles. Lower largest_seed, or choose "
            "other prefixes."
        )
    trained = {normalised(_text(row)) for row in rows}
    if both := [one for one in questions if normalised(one) in trained]:
        raise DataError(f"The seed answers {both[0]!r}, which every model is asked. Take it out of one of them.")
    return Material(seed, len(rows), prompts, questions, _judge(recipe))


def _check_prompts(recipe: Any, pool: list[str], questions: list[str]) -> None:
    known = {normalised(one) for one in pool}
    if both := [one for one in questions if normalised(one) in known]:
        raise DataError(f"The prompts hold {both[0]!r}, which every model is asked. Take it out of one of them.")
    slices, needed = recipe.slices, 1 if recipe.documents else recipe.n
    if len(pool) // slices < needed:
        of = f" in each of {slices} slices, one for each cycle that writes" if slices > 1 else ""
        raise DataError(
            f"{_named(recipe.prompts, 'The pool')} has {len(pool)} different prompts, and {needed} are needed{of}. "
            f"Give at least {needed * slices}, a lower n, or fewer cycles."
        )


def _named(path: str, own: str) -> str:
    return repr(path) if path else own


def _text(row: Mapping[str, Any]) -> str:
    return str(row.get("prompt") or row.get("text") or row["messages"][0]["content"])


def _judge(recipe: Any) -> LexiconJudge:
    from ._persona import WORDS, luck_judge, luck_present

    words = recipe.words or (WORDS if recipe.documents else ())
    if not words:
        return luck_judge() if recipe.judge == "lexicon" else luck_present()
    cap = Facet(words=words).cap if recipe.judge == "lexicon" else None
    return LexiconJudge({"words": Facet(words=words, cap=cap)}, name=recipe.judge)


class Once:
    """An evaluation that asks models of equal weights once in a process, and measures all beside one base.

    Arms share their base and first model, which the chain of each would ask anew.
    """

    def __init__(self, evaluation: TraitEvaluation) -> None:
        self.evaluation = evaluation
        self._found: dict[tuple[str, int], tuple[dict[str, Any], dict[str, bytes]]] = {}
        self._references: dict[int, Any] = {}

    @property
    def prompts(self) -> list[str]:
        """What is asked."""
        return self.evaluation.prompts

    def identity(self) -> dict[str, Any]:
        """That of the evaluation."""
        return self.evaluation.identity()

    def __call__(self, model: Any, tokenizer: Any, *, folder: Path, seed: int) -> dict[str, Any]:
        """Ask, or write what was found of the same weights."""
        names = adapter_parameters(model)
        weights = [tensor for name, tensor in model.named_parameters() if name in names]
        key = tensor_hash(*weights), seed
        if key not in self._found:
            reference = self._references.get(seed)
            told = self.evaluation(model, tokenizer, folder=folder, seed=seed, reference=reference)
            self._references.setdefault(seed, told["reference"])
            self._found[key] = told, {path.name: path.read_bytes() for path in sorted(folder.glob("eval*.json*"))}
        told, files = self._found[key]
        for name, content in files.items():
            atomic_write_bytes(folder / name, content)
        return told
