"""Does a trait that grows when each model prefers its own answers do so from the base, or only from its own weights?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ._chain import Condition
from ._preferences import PreferenceRecipe


@dataclass(kw_only=True)
class ContinualBesideReinit(PreferenceRecipe):
    """Run a chain of preference optimisation from its own weights beside its twin that starts each cycle at the base.

    Both begin at the same first model, see prompts in the same order and sample with the same random numbers; the
    questions are the same too. What differs is where a cycle's training starts, and from cycle 1 on who writes.
    """

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.init != "continual":
            raise RecipeError(
                f"init={self.init!r}: cycles/dpo_contrast has both, the continual chain and its reinit twin. Leave it "
                "out, or run cycles/dpo."
            )

    def question(self) -> str:
        """What is asked."""
        return (
            f"Preferring its own answers, does {self.trait} grow where each cycle goes on from its own weights, and "
            "where each starts at the base?"
        )

    def arms(self) -> list[Condition]:
        """The continual arm, its twin, and those beside them."""
        main, *others = super().arms()
        twin = replace(main, name="DPO reinit", key="twin", control="reinit twin", chain={"init": "reinit"})
        return [main, twin, *(arm for arm in others if arm.control != "reinit twin")]

    def own_figures(self, report: Any, title: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Both arms in each panel."""
        from ._contrast import CAPTION, contrast_figure

        return {"contrast": contrast_figure(list(report.arms.values())[:2], title=title)}, {"contrast": CAPTION}

    def own_findings(self, report: Any) -> list[str]:
        """Both arms in one sentence, with how much they repeat themselves."""
        from ._contrast import sentence

        return [sentence(*list(report.arms.values())[:2], trait=self.trait)]
