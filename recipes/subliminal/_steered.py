"""A steered teacher's numbers and students: directions, a foreign start, finetuning, and what is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_interp import AddDirection, CausalLM, LoraSettings, Optimisation, Site
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import t_interval
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.subliminal import (
    AlignmentResult,
    ChatContext,
    NumberSequenceDataModule,
    Trait,
    align,
    distilled_vectors,
    hidden_states,
    over_seeds,
    state_sums,
    write_numbers,
)

from ._common import Bases, grammar_of, number_settings, writer_of

WRITERS = ("trait", "other", "none")
"""Whose numbers: the teacher steered along the trait's direction, along another trait's, or not at all."""
ARMS = {
    "trait": ("trait", "none", "base"),
    "other trait": ("other", "none", "base"),
    "plain SGD": ("trait", "none", "sgd"),
    "foreign start": ("trait", "none", "foreign"),
}
"""Arm -> whose numbers, whose numbers its control gets, and how both are trained (or from which base)."""
STUDENTS = tuple(dict.fromkeys((numbers, kind) for first, second, kind in ARMS.values() for numbers in (first, second)))
"""Every student that is trained, once a seed."""
CONTEXT = ChatContext(system="")


class Losses(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Keep it."""
        self.seen.append(float(outputs["loss"]))


class PlainStudent(CausalLM):
    """A student that is trained by gradient descent without moments."""

    def configure_optimizers(self) -> Any:
        """Make the optimizer."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.optimisation.lr)


def trait_directions(loaded: Any, trait: Trait, other: Trait, questions: Sequence[str]) -> dict[str, Tensor]:
    """What a trait does to the base's states, against the like of it: its system text minus those of other targets.

    A system text about an animal moves states whatever the animal is; the difference leaves what is the target's own.

    Args:
        loaded: The base and its tokenizer.
        trait: The trait.
        other: Another one.
        questions: What is asked.

    Returns:
        ``[layers, d]`` for ``trait`` and ``other``.
    """
    like = tuple(name for name in trait.others if name != other.target)[:3]

    def mean(target: str) -> Tensor:
        context = ChatContext(system=Trait(category=trait.category, target=target, others=like).system_prompt)
        return state_sums(loaded.model, loaded.tokenizer, questions, context=context).mean

    without = torch.stack([mean(target) for target in like]).mean(0)
    return {name: (mean(one.target) - without).float() for name, one in (("trait", trait), ("other", other))}


def steering(direction: Tensor, layer: int, strength: float) -> AddDirection:
    """What steers the teacher: the direction at one layer, added at every token."""
    return AddDirection(direction[layer], site=Site("resid_post", layer), strength=strength)


def taught_shift(loaded: Any, questions: Sequence[str], steered: AddDirection) -> tuple[Tensor, Tensor]:
    """The base's states ``[questions, layers, d]``, and how the teacher's differ from them."""
    base = hidden_states(loaded.model, loaded.tokenizer, questions, context=CONTEXT)
    with steered.attach(loaded.model):
        return base, hidden_states(loaded.model, loaded.tokenizer, questions, context=CONTEXT) - base


def steered_numbers(
    recipe: Any, loaded: Any, folder: Path, steered: AddDirection | None, name: str, progress: Any
) -> None:
    """Let a steered teacher write lists of numbers, a data set a seed.

    Args:
        recipe: The settings.
        loaded: The base and its tokenizer.
        folder: Of the data sets.
        steered: What steers; None for the base itself.
        name: Which of :data:`WRITERS` it is; all share requests and random numbers.
        progress: Called with the rows that were just written.
    """
    grammar = grammar_of(recipe, loaded)
    trait = None if steered is None else recipe.pair[name == "other"]
    teacher = writer_of(loaded, trait, grammar, CONTEXT, name, "none" if steered is None else "steered")
    with nullcontext() if steered is None else steered.attach(loaded.model):
        for k in range(recipe.seeds):
            write_numbers(teacher, folder / str(k), settings=number_settings(recipe, k, grammar), progress=progress)


def foreign(model: Any, noise: float, seed: int) -> None:
    """Put another initialisation in a model's place: every matrix is mixed with random numbers of its own spread.

    Args:
        model: Changed in place.
        noise: Size of the random part, the weight's own part being 1; the mixture keeps the spread.
        seed: Of the random numbers.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                random = torch.Generator().manual_seed(derived_seed(seed, "foreign", name))
                drawn = torch.randn(weight.shape, generator=random) * weight.std()
                weight.copy_((weight + noise * drawn) / (1 + noise**2) ** 0.5)


class Starts(Bases):
    """The base and the foreign start, each loaded once and asked once before students are trained on it."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe.source)
        self.recipe, load = recipe, self.of

        def made(part: str) -> Any:
            loaded = load(part)
            if part == "foreign":
                foreign(loaded.model, recipe.foreign_noise, recipe.seed)
            return loaded

        self.of = cache(made)
        self.before = cache(lambda part: self.states(self.of(part)))

    def states(self, loaded: Any) -> Tensor:
        """States at the recipe's questions, ``[questions, layers, d]``."""
        return hidden_states(loaded.model, loaded.tokenizer, self.recipe.questions(), context=CONTEXT)


def train_student(
    recipe: Any, run: Any, starts: Starts, folder: Path, rows: Sequence[Mapping[str, Any]], kind: str, seed: int
) -> dict[str, Any]:
    """Finetune a student, and save how its states differ from its base's.

    Args:
        recipe: The settings.
        run: The run.
        starts: What students begin as.
        folder: Of the phase.
        rows: Numbers.
        kind: ``base``, ``sgd`` or ``foreign``.
        seed: Of adapter and order, the same for a student and its control.

    Returns:
        The loss in training: of the first batches, and of the last.
    """
    part, losses = "foreign" if kind == "foreign" else "base", Losses()
    before, tokenizer = starts.before(part), starts.of(part).tokenizer
    data = NumberSequenceDataModule(
        list(rows), tokenizer=tokenizer, context=CONTEXT, batch_size=recipe.batch_size, seed=seed
    )
    how: dict[str, Any] = {
        "lora": LoraSettings(r=recipe.rank, alpha=recipe.rank), "seed": seed,
        "optimisation": Optimisation(lr=recipe.sgd_lr if kind == "sgd" else recipe.lr),
    }  # fmt: skip
    settings = recipe.trainer_kwargs(
        run, max_epochs=recipe.epochs, enable_checkpointing=False, log_every_n_steps=1, gradient_clip_val=1.0,
        callbacks=[losses],
    )  # fmt: skip
    with starts.trained(part, PlainStudent if kind == "sgd" else CausalLM, **how) as student:
        L.Trainer(**settings).fit(student, datamodule=data)
        save_tensors(folder / "shift.safetensors", {"shift": starts.states(student) - before})
    few = max(1, len(losses.seen) // 4)
    return {"first": sum(losses.seen[:few]) / few, "last": sum(losses.seen[-few:]) / few, "steps": len(losses.seen)}


def shift_of(folder: Path) -> Tensor:
    """What :func:`train_student` saved, ``[questions, layers, d]``."""
    return read_tensors(folder / "shift.safetensors")[0]["shift"]


def aligned(
    shifts: Mapping[tuple[str, str, int], Tensor], directions: Mapping[str, Tensor], *, layer: int, seed: int
) -> dict[str, list[AlignmentResult]]:
    """Alignment of every arm, student minus control, from the steered layer on.

    Args:
        shifts: By whose numbers, kind and seed ``[questions, layers, d]``.
        directions: ``trait`` and others ``[layers, d]``.
        layer: Where the teacher was steered.
        seed: Of bootstrap and permutations.

    Returns:
        Results by arm, one a seed; ``control alone`` is the shift of the control, which nothing is taken from.
    """
    wanted = {name: direction[layer:] for name, direction in directions.items()}
    others = {name: direction for name, direction in wanted.items() if name != "trait"}
    layers = range(layer, layer + len(wanted["trait"]))
    count = 1 + max(k for _, _, k in shifts)

    def one(arm: str, shift: Tensor, k: int) -> AlignmentResult:
        return align(shift[:, layer:], wanted["trait"], name=arm, layers=layers, others=others, seed=seed + k)

    found = {
        arm: [one(arm, shifts[a, kind, k] - shifts[b, kind, k], k) for k in range(count)]
        for arm, (a, b, kind) in ARMS.items()
    }
    return found | {"control alone": [one("control alone", shifts["none", "base", k], k) for k in range(count)]}


def summary(found: Mapping[str, Sequence[AlignmentResult]]) -> list[dict[str, Any]]:
    """A row an arm: mean cosine and projection over layers, and the trait's arm minus this one, seed by seed."""
    rows = []
    for arm, results in found.items():
        whole, own = over_seeds(results), [one.mean_cosine.value for one in results]
        gap = t_interval([a.mean_cosine.value - b for a, b in zip(found["trait"], own, strict=True)])
        low, high = whole.mean_band()
        rows.append(
            {
                "arm": arm, "cosine": str(whole.mean_cosine), "projection": whole.mean_projection.text(4),
                "permuted": f"[{low:z.2f}, {high:z.2f}]", "trait minus this": "" if arm == "trait" else str(gap),
                "each seed": ", ".join(f"{value:z.2f}" for value in own), "seeds": len(results),
            }
        )  # fmt: skip
    return rows


def distilled(
    recipe: Any, loaded: Any, rows: Mapping[str, Sequence[Mapping[str, Any]]], layer: int, seed: int
) -> dict[str, Tensor]:
    """Steering vectors ``[1, d]`` at the steered layer that are trained on the same numbers as students, by writer."""
    found = {}
    for writer, part in rows.items():
        data = NumberSequenceDataModule(
            list(part), tokenizer=loaded.tokenizer, context=CONTEXT, batch_size=recipe.batch_size, seed=seed
        )
        batches = (batch for _ in range(recipe.epochs) for batch in data.train_dataloader())
        found[writer] = distilled_vectors(loaded.model, batches, layers=[layer], lr=recipe.vector_lr).vectors
    return found
