"""Settings and training of recipes in which models prefer their own answers to those of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ._chain import ChainRecipe, trained_with


@dataclass(kw_only=True)
class PreferenceRecipe(ChainRecipe):
    """Fields of direct preference optimisation, and how cycles train by it."""

    setting: ClassVar[str] = "DPO"
    controls_known: ClassVar[tuple[str, ...]] = ("no-seed", "shuffled", "reinit-twin", "swapped")
    own_terms: ClassVar[Mapping[str, str]] = {
        "DPO": "direct preference optimisation: own answers chosen, those of the base rejected",
        "accuracy": "share of pairs of which the policy has come to prefer the chosen one, beside its reference",
        "margin": "beta times how much more log-probability the chosen one has gained than the rejected one, in nats",
    }

    init: Literal["reinit", "continual"] = "continual"
    """Whether a cycle starts at the base with a new adapter, or at the weights of the last one."""
    start: Literal["sft", "dpo"] = "sft"
    """How cycle 0 learns the seed: finetuned on its replies, or as the paper does, preferring them to the base's."""
    seed_lr: float = 1e-3
    """Learning rate of cycle 0 where it is finetuned."""
    n: int = 32
    """Pairs that each later cycle learns; prompts are drawn from all of them."""
    max_new_tokens: int = 32
    """Most tokens of a reply, in cycles and of questions."""
    lr: float = 3e-4
    """Learning rate, which falls to 0 along a cosine in each cycle."""
    batch_size: int = 4
    """Pairs a step."""
    beta: float = 0.1
    """How little the policy may leave its reference."""
    rejected_from: Literal["base", "previous"] = "base"
    """Who writes what is rejected: the base, or the model before the last one."""

    @property
    def slices(self) -> int:
        """One: each cycle draws from all prompts."""
        return 1

    def fit(self, **changes: Any) -> Any:
        """Direct preference optimisation."""
        from lightning_interp.cycles import FitDPO

        own = FitDPO(beta=self.beta, rejected_from=self.rejected_from)
        return trained_with(own, self.lr, epochs=self.epochs, batch_size=self.batch_size, **changes)

    def seed_fit(self, **changes: Any) -> Any:
        """Cycle 0 as the start has it."""
        from lightning_interp.cycles import FitSFT

        return self.fit(**changes) if self.start == "dpo" else trained_with(FitSFT(), self.seed_lr, **changes)
