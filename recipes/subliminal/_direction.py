"""The trait's direction in hidden states, with which the students' shifts are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.measure.statistics import Estimate, t_interval
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.subliminal import (
    AlignmentResult,
    ChatContext,
    Trait,
    align,
    hidden_states,
    over_seeds,
    preference_questions,
)

FILE = "directions.safetensors"


def asked_of(category: str, count: int) -> tuple[list[str], list[str]]:
    """Questions that directions are made from, and others, at which shifts are read."""
    questions = preference_questions(category, count)
    return questions[::2], questions[1::2]


def write_directions(
    folder: Path, loaded: Any, traits: Sequence[Trait], questions: Sequence[str], context: ChatContext
) -> dict[str, float]:
    """States with the trait's system text minus states without, a question a row; gives their mean lengths."""
    plain = hidden_states(loaded.model, loaded.tokenizer, questions, context=context)
    found = {}
    for trait in traits:
        held = replace(context, system=trait.system_prompt)
        found[trait.target] = hidden_states(loaded.model, loaded.tokenizer, questions, context=held) - plain
    save_tensors(folder / FILE, found)
    return {target: float(rows.mean(0).norm(dim=-1).mean()) for target, rows in found.items()}


def alignments(folder: Path, shifts: Mapping[str, Tensor], targets: Sequence[str]) -> list[AlignmentResult]:
    """How far students went the trait's way, by arm, and how far apart both arms went along the traits' difference.

    Args:
        folder: Of the directions.
        shifts: States of a student minus the base's, by ``arm-dataset-seed``.
        targets: The trait, and the control's if it has one.

    Returns:
        Means over students: of both arms along the trait's direction, and of their difference.
    """
    directions = {name: rows.mean(0) for name, rows in read_tensors(folder / FILE)[0].items()}
    mine, others = directions[targets[0]], {name: directions[name] for name in targets[1:]}
    keys = sorted(name.partition("-")[2] for name in shifts if name.startswith("trait-"))
    found = []
    for arm in ("trait", "control"):
        each = [align(shifts[f"{arm}-{key}"], mine, others=others, seed=i) for i, key in enumerate(keys)]
        found.append(over_seeds(each, name=f"{arm} students"))
    apart = mine - others[targets[1]] if others else mine
    pairs = [align(shifts[f"trait-{key}"] - shifts[f"control-{key}"], apart, seed=i) for i, key in enumerate(keys)]
    return [*found, over_seeds(pairs, name="trait minus control")]


def paired_alignment(folder: Path, shifts: Mapping[str, Tensor], target: str) -> Estimate:
    """Mean cosine over layers with a trait's direction: of students of the trait minus their controls."""
    direction = read_tensors(folder / FILE)[0][target].mean(0)
    keys = sorted(name.partition("-")[2] for name in shifts if name.startswith("trait-"))

    def cosine(name: str) -> float:
        return float(torch.cosine_similarity(shifts[name].mean(0), direction, dim=-1).nan_to_num().mean())

    return t_interval([cosine(f"trait-{key}") - cosine(f"control-{key}") for key in keys])
