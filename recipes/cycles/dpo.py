"""Does a trait grow, hold or fade when each model prefers its own answers to the base's?"""

from __future__ import annotations

from dataclasses import dataclass

from ._preferences import PreferenceRecipe


@dataclass(kw_only=True)
class PreferredCycles(PreferenceRecipe):
    """Finetune a model on a few replies with a trait; then, cycle after cycle, let it prefer its replies to the base's.

    Each cycle answers prompts twice, by the model before it and by the base, and is trained by direct preference
    optimisation to prefer the first. Its reference is the policy at its first step. Every model is asked the same
    questions with the same random numbers; beside the score stand coherence and repetition, and the base.
    """

    def question(self) -> str:
        """What is asked."""
        return f"Preferring its own answers, {self.init} each cycle: does {self.trait} grow, hold or fade?"
