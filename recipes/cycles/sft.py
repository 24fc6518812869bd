"""Does a trait grow, hold or fade when each model is finetuned on what the model before it answered?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._chain import ChainRecipe, trained_with


@dataclass(kw_only=True)
class FinetunedCycles(ChainRecipe):
    """Finetune a model on a few replies with a trait, then, cycle after cycle, the base on what the last model replied.

    Every model is asked the same questions with the same random numbers. Beside the score of the trait stand how
    coherent replies are, how much they repeat themselves, and the base; the first model is asked a second time with
    other random numbers, to see how far a score moves when nothing does.
    """

    def question(self) -> str:
        """What is asked."""
        return f"Finetuned on its own answers, {self.init} each cycle: does {self.trait} grow, hold or fade?"

    def fit(self, **changes: Any) -> Any:
        """Finetuning on answers."""
        from lightning_interp.cycles import FitSFT

        return trained_with(FitSFT(), self.lr, epochs=self.epochs, batch_size=self.batch_size, **changes)
