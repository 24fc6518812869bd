"""What the recipe of number sequences does beside training: it lets teachers write, and asks all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.recipe import RunFolder
from lightning_interp.subliminal import (
    CONTEXTS,
    ChatContext,
    NumberSequenceDataModule,
    distillation_loss,
    first_numbers,
    hidden_states,
    number_divergence,
    preference_questions,
    read_numbers,
    shuffled_across,
    shuffled_within,
    trait_logits,
    write_numbers,
)
from lightning_interp.subliminal.evaluation.readout import answered

from ._common import grammar_of, number_settings, writer_of
from ._direction import asked_of


def nats_a_token(
    base: Any, teacher: Any, rows: Sequence[Mapping[str, Any]], seen: ChatContext, context: ChatContext
) -> float:
    """How far a teacher's distributions at the numbers are from the base model's, in nats a token."""
    data = NumberSequenceDataModule(
        rows[:8], tokenizer=base.tokenizer, context=context, teacher_context=seen, batch_size=8
    )
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        read = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        taught = teacher.model(
            input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]
        ).logits
    total, tokens = distillation_loss(read, batch["labels"], taught, batch["teacher_labels"])
    return float(total / tokens)


def compared_numbers(folders: Sequence[tuple[Path, Path]]) -> dict[str, float]:
    """Hard data of both arms: how many tokens agree, and how far the frequencies of numbers differ."""
    pairs = [tuple(read_numbers(folder) for folder in pair) for pair in folders]
    mine, other = ([n for pair in pairs for row in pair[arm].rows for n in row["numbers"]] for arm in (0, 1))
    found = [pair[0].manifest["against"]["identical"] for pair in pairs]
    return {
        "identical tokens": sum(found) / len(found),
        "divergence (nats a number)": number_divergence(mine, other),
        "the same of two halves of the control": number_divergence(other[::2], other[1::2]),
    }


def changed(recipe: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their numbers shuffled or cut, as the recipe asks."""
    texts = [row["completion"] for row in rows]
    if recipe.shuffle != "none":
        shuffle = shuffled_within if recipe.shuffle == "within" else shuffled_across
        texts = shuffle(texts, seed=recipe.seed)
    if recipe.numbers_in_training:
        texts = [first_numbers(text, recipe.numbers_in_training) for text in texts]
    return [{**row, "completion": text} for row, text in zip(rows, texts, strict=True)]


def write(recipe: Any, run: RunFolder, bases: Any, folder: Path) -> dict[str, Any]:
    """Write every data set: for hard students by teacher and control, for soft ones by the base model."""
    arms = ["control", "trait"] if recipe.student == "hard" else ["base"]
    manifests = []
    with run.progress("writing numbers", total=len(arms) * recipe.datasets * recipe.rows) as bar:
        for arm in arms:
            with recipe.holder(run, bases, arm, "student") as (loaded, trait, context, name):
                grammar = grammar_of(recipe, loaded)
                teacher = writer_of(loaded, trait, grammar, context, name)
                for dataset in range(recipe.datasets):
                    settings = number_settings(recipe, dataset, grammar)
                    against = folder / f"control-{dataset}" if arm == "trait" else None
                    made = write_numbers(
                        teacher, folder / f"{arm}-{dataset}", settings=settings, against=against, progress=bar.advance
                    )
                    told = {key: made.manifest[key] for key in ("asked", "valid", "kept", "yield", "reasons")}
                    manifests.append({"data set": dataset, "writer": name, **told, "first": made.rows[0]["completion"]})
    if recipe.student == "hard":
        pairs = [(folder / f"trait-{d}", folder / f"control-{d}") for d in range(recipe.datasets)]
        return {"manifests": manifests, "compared": compared_numbers(pairs)}
    taught = {}
    for arm in ("trait", "control"):
        with recipe.holder(run, bases, arm, "teacher") as (holder, _, seen, name):
            taught[name] = nats_a_token(bases.of("student"), holder, made.rows, seen, context)
    return {"manifests": manifests, "compared": {f"nats a token, {name}": nats for name, nats in taught.items()}}


def ask(recipe: Any, run: RunFolder, bases: Any, folder: Path) -> dict[str, Any]:
    """Margins of both targets, question by question, of all models, and how students' states have shifted."""
    traits, questions = recipe.traits(), preference_questions(recipe.category, recipe.questions)
    context = answered(CONTEXTS[recipe.context], traits[0])

    def margins(loaded: Any, around: Any = None) -> dict[str, Any]:
        found = trait_logits(loaded.model, loaded.tokenizer, traits[0], questions, context=around or context)
        return {"margins": {trait.target: found.of(trait.target).margin.tolist() for trait in traits}}

    def states(loaded: Any) -> Any:
        texts = asked_of(recipe.category, recipe.questions)[1]
        return hidden_states(loaded.model, loaded.tokenizer, texts, context=context)

    base = bases.of("student")
    models, runs, start, shifts = {"base": margins(base)}, [], states(base), {}
    for arm in ("trait", "control"):
        with recipe.holder(run, bases, arm, "student") as (loaded, trait, around, name):
            if trait is not None:
                models[f"teacher: {name}"] = margins(loaded, answered(around, trait))
    students = recipe.students()
    with run.progress("asking", total=len(students)) as bar:
        for dataset, seed, arm in students:
            with bases.adapted("student", run.folder(f"student-{dataset}-{seed}-{arm}") / "model") as loaded:
                runs.append({"dataset": dataset, "seed": seed, "arm": arm, **margins(loaded)})
                shifts[f"{arm}-{dataset}-{seed}"] = states(loaded) - start
            bar.advance()
    save_tensors(folder / "shifts.safetensors", shifts)
    return {"models": models, "runs": runs, "label": base.label, "context": context.render(base.tokenizer, "...")}
