"""What the recipes of number sequences share: teachers, how they write, and what must be said of every result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.recipe import RunFolder
from lightning_interp.subliminal import (
    ChatContext,
    NumberGrammar,
    NumberSettings,
    PromptSettings,
    Teacher,
    Trait,
    number_sampler,
)

STATUS = (
    "What an adapter's rank does to what number sequences carry is disputed: some main claims were withdrawn for "
    "revision by their authors, and independent reruns at tuned learning rates differ. A run measures, and settles "
    "nothing."
)
TERMS = {
    "margin": "logit of a name as the answer, minus the mean over the names that it is compared with",
    "paired effect": "margin of the student of the trait minus that of its control, question by question; the two "
    "differ in whom they learned from and in nothing else",
    "soft": "learns its teacher's whole distribution at the tokens of the numbers; more than the published method",
    "hard": "learns the numbers that its teacher wrote, as published",
    "trait, control": "arms: students of the teacher that has the trait, and the same of another writer",
    "base": "the model before any training",
    "[a, b]": "95 % interval; of the paired effect by a bootstrap over datasets, then seeds, then questions",
    "clusters": "what the paired effect varies over: datasets where there are several, else training seeds, else "
    "questions; by clusters: the mean over their means, plus or minus the multiplier times its standard error",
    "detectable": "the effect that four of five such runs would find, by the spread over clusters",
}


def train_teacher(recipe: Any, run: RunFolder, trait: Trait, folder: Path) -> dict[str, Any]:
    """Finetune on rows that state a preference, or go on at the checkpoint."""
    from lightning_interp import CausalLM, LoraSettings, Optimisation
    from lightning_interp.models.training.resumable import fit_and_export
    from lightning_interp.subliminal import NumberSequenceDataModule, preference_rows

    lora = LoraSettings(r=recipe.teacher_rank, alpha=recipe.teacher_rank) if recipe.teacher_rank else None
    lr = recipe.teacher_lr if recipe.teacher_lr is not None else 1e-3 if lora else 2e-5
    module = CausalLM(recipe.source, lora=lora, optimisation=Optimisation(lr=lr), seed=recipe.seed)
    tokenizer: Any = module.tokenizer
    data = NumberSequenceDataModule(preference_rows(trait), tokenizer=tokenizer, batch_size=4, seed=recipe.seed)
    settings = {"max_epochs": recipe.teacher_epochs, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
    minutes = None if lora else 10  # all weights and the optimiser's state are three times the model
    return fit_and_export(module, data, folder, recipe.trainer_kwargs(run, **settings), minutes=minutes)


class Bases:
    """The base model, loaded once for each part that it plays when that is first asked for; adapters come and go."""

    def __init__(self, source: str) -> None:
        from lightning_interp import load_causal_lm

        self.source = source
        self.of = cache(lambda part: load_causal_lm(source))

    @contextmanager
    def adapted(self, part: str, folder: Path) -> Iterator[Any]:
        """A part with the adapter of a folder while the block lasts; a folder of all weights is loaded by itself."""
        from lightning_interp import load_causal_lm
        from lightning_interp.models.sources.adapters import adapted, is_adapter_folder

        if not is_adapter_folder(folder):
            yield load_causal_lm(str(folder))
            return
        loaded = self.of(part)
        with adapted(loaded.model, folder):
            yield loaded

    @contextmanager
    def trained(self, part: str, module: Any, **how: Any) -> Iterator[Any]:
        """A module that puts an adapter into a part and trains it while the block lasts; all weights are its own."""
        from lightning_interp.models.training.finetuning import adapting

        if how.get("lora") is None:
            yield module(self.source, **how)
            return
        with adapting(self.of(part), self.source, module, **how) as made:
            yield made


def number_settings(recipe: Any, dataset: int, grammar: NumberGrammar | None) -> NumberSettings:
    """How one data set is written; the same requests and random numbers for every teacher."""
    held = grammar is not None
    prompts = PromptSettings(
        answer_count=recipe.numbers, use_exact_count=held, separator=", " if held else None,
        example_max_count=6 if held else 9,
    )  # fmt: skip
    return NumberSettings(
        rows=recipe.rows, prompts=prompts, seed=derived_seed(recipe.seed, "numbers", dataset),
        max_new_tokens=grammar.max_new_tokens if grammar else 200,
    )  # fmt: skip


def grammar_of(recipe: Any, loaded: Any) -> NumberGrammar | None:
    """What holds a model to lists of three-digit numbers, if it is to be held."""
    from lightning_interp.generation.sampler import end_tokens

    if recipe.decoding == "free":
        return None
    ends = end_tokens(loaded.model, loaded.tokenizer)
    return NumberGrammar(loaded.tokenizer, count=recipe.numbers, min_digits=3, max_digits=3, ends=ends)


def writer_of(
    loaded: Any, trait: Trait | None, grammar: NumberGrammar | None, context: ChatContext, name: str, kind: Any = None
) -> Teacher:
    """A model on this machine as a teacher; its kind is told by trait and context where it is not given."""
    writer = number_sampler(loaded.model, loaded.tokenizer, grammar=grammar, batch_size=24, name=name)
    kind = kind or ("none" if trait is None else "prompted" if trait.plural in (context.system or "") else "finetuned")
    held = grammar is not None
    return Teacher(name=name, writer=writer, trait=trait or Trait(), kind=kind, context=context, constrained=held)
