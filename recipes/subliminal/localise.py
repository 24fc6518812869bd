"""At which tokens does an adapter do what it does? Six gates on one adapter, each beside its inverse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class SubliminalLocalise(Recipe):
    """Let an adapter act at some tokens of a question alone, and everywhere but there, and ask about a trait.

    By default an adapter is trained on a few rows that state a preference, which shows what the instrument sees where
    the answer is known; ``adapter`` takes a student of number sequences instead. Where an adapter acts, it writes keys
    and values that later tokens read with the weights of their own gate. What is enough (a gate alone) and what is
    needed (its inverse) are two questions, so both are shown.
    """

    adapter: str = ""
    """Folder of an adapter (PEFT), as runs/numbers/phases/student-0-0-trait/model; by default one is trained here."""
    trait: str = "wolf"
    """What the adapter is about."""
    category: str = "animal"
    """What the trait is one of; animal and tree bring their own list to compare with."""
    entity: str = "SmolLM"
    """Name in the prompt that gets a gate of its own, as the model's own in its system text; empty for none."""
    system: str | None = None
    """System text of the questions; null is the chat template's own, if any."""
    modules: str | None = None
    """Gate maps of attention (attn) or feed-forward maps (ffn) alone, the others being off; null for all."""
    layers: str | None = None
    """Gate some layers alone, such as early or 0.5-1.0; null for all."""
    questions: int = 24
    """Questions about the trait; the unit of every interval."""
    teacher_epochs: int = 8
    """Passes over eight rows that state the preference, of an adapter that is trained here."""
    teacher_rank: int = 8
    """Its rank, on every linear map; alpha is the rank."""
    teacher_lr: float | None = None
    """Its learning rate; 1e-3 by default."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.questions, self.teacher_epochs, self.entity = 3, 1, self.category
        for name in ("questions", "teacher_epochs", "teacher_rank"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected at least 1.")

    def study(self, run: RunFolder) -> RecipeResult:
        """Train if there is no adapter, then ask under every gate."""
        if not self.adapter:
            run.phase("train", lambda folder: self.train(run, folder), every_rank=True)
        asked = run.phase("gates", lambda folder: self.ask(run))
        return self.result(asked)

    def asked_about(self) -> Any:
        """The trait."""
        from lightning_interp.subliminal import Trait

        trait = Trait(category=self.category, target=self.trait)
        return Trait(category=self.category, target=self.trait, others=trait.others[:2]) if self.smoke else trait

    def train(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Finetune an adapter on rows that state the preference."""
        from ._common import train_teacher

        return train_teacher(self, run, self.asked_about(), folder)

    def ask(self, run: RunFolder) -> dict[str, Any]:
        """Margins and probabilities under every gate, question by question."""
        from lightning_interp import load_causal_lm
        from lightning_interp.running.terminal import print_table
        from lightning_interp.subliminal import ChatContext, answered, preference_questions

        from ._localise import gates_of, located, read_under

        loaded = load_causal_lm(self.adapter or str(run.folder("train") / "model"))
        context = answered(ChatContext(system=self.system), self.asked_about())
        questions = preference_questions(self.category, self.questions)
        gates, left_out = located(gates_of(self), loaded.tokenizer, context, questions)
        with run.progress("gates", total=len(gates)) as bar:
            rows = []
            for name, (spec, tokens) in gates.items():
                found = read_under(loaded, spec, self.asked_about(), questions, context)
                rows.append({"gate": name, "on tokens": tokens, **found})
                bar.advance()
        print_table(
            "the prompt of the first question", [{"text": repr(context.render(loaded.tokenizer, questions[0]))}]
        )
        return {"rows": rows, "left_out": left_out, "label": loaded.label}

    def result(self, asked: dict[str, Any]) -> RecipeResult:
        """Every gate beside its inverse, with intervals over questions, and what may not be concluded."""
        from lightning_interp.core.measure.statistics import mean_interval

        from ._localise import CAPTION, TERMS, about, beside, findings, gates_figure

        rows = asked["rows"]
        margins = {row["gate"]: mean_interval(row["margin"]) for row in rows}
        title = f"{asked['label']}, {self.trait} against {len(self.asked_about().others)} others"
        return RecipeResult(
            metrics={
                row["gate"]: {
                    "on_tokens": row["on tokens"], "margin": margins[row["gate"]].to_dict(),
                    "probability": sum(row["share"]) / len(row["share"]),
                }
                for row in rows
            },
            tables={"gates": beside(rows), "questions": rows},
            figures={"gates": gates_figure(margins, title=title)},
            question=f"At which tokens does the adapter act when the model answers {self.trait}?",
            findings=findings(self, margins),
            captions={"gates": CAPTION},
            terms=TERMS,
            caveats=about(self, asked),
            summary="gates",
        )  # fmt: skip
