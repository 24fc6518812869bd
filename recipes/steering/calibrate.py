"""How strong to steer: a strength chosen by its effect on validation contexts and confirmed on others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class CalibrateSteering(Recipe):
    """Choose the KL budget of dual steering, or the strength of an added direction, by the concept's probability.

    Prompts are split in two. On the first half every candidate is tried, all strengths of a prompt in one forward pass;
    the one whose mean P(W=1) is the wanted one is found by interpolation, and confirmed on the second half. Where none
    reaches it, the nearest is taken, and the run says so.
    """

    method: Literal["dual", "add"] = "dual"
    """Dual steering at the head, by its KL budget; or a direction added to the residual stream, by its strength."""
    concept: str = "capitalised"
    """Kind of token pairs (capitalised, number_digit, verb_ing, verb_past, verb_third, letters), or a JSON file."""
    wanted: float = 0.5
    """Mean P(W=1) at the last token of a prompt."""
    prompts: str = ""
    """File with one prompt a line, or JSONL with text; by default the model writes its own."""
    count: int = 48
    """Prompts that the model writes."""
    length: int = 12
    """New tokens of each."""
    layer: int = -1
    """Block after which a direction is added; for the last one it is the unembedding's direction."""
    strengths: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    """Candidates: nats for dual steering; for an added direction, multiples of the stream's mean length / 10."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if not 0 < self.wanted < 1:
            raise RecipeError(f"wanted={self.wanted}: expected a probability inside (0, 1).")
        if len(self.strengths) < 2 or sorted(set(self.strengths)) != list(self.strengths) or self.strengths[0] != 0:
            raise RecipeError(f"strengths={self.strengths}: expected ascending numbers that begin with 0.")
        if self.smoke:
            self.concept, self.count, self.length = "letters", 8, 4

    def study(self, run: RunFolder) -> RecipeResult:
        """Write prompts, sweep, choose, confirm."""
        prompts = run.phase("prompts", lambda folder: self.write(run))
        swept = run.phase("sweep", lambda folder: self.sweep(run, folder, prompts))
        return self.result(run, swept)

    def write(self, run: RunFolder) -> list[str]:
        """The prompts."""
        from ._common import texts_or_samples

        sizes = {"count": self.count, "length": self.length, "seed": self.seed}
        return texts_or_samples(self.source, self.prompts, **sizes, progress=run.progress)

    def sweep(self, run: RunFolder, folder: Path, prompts: list[str]) -> dict[str, Any]:
        """Every strength on the validation half, the chosen one on the other half."""
        from lightning_interp import load_causal_lm
        from lightning_interp.core.storage.files import atomic_write_text
        from lightning_interp.running.results import write_scalars

        from ._calibrate import chosen_strength, shortfall, strength_effects
        from ._common import concept_direction, concept_pairs

        loaded = load_causal_lm(self.source)
        pairs = concept_pairs(loaded.tokenizer, self.concept)
        direction, half = concept_direction(loaded.model, pairs), len(prompts) // 2
        settings: dict[str, Any] = {"method": self.method, "layer": self.layer}
        with run.progress("sweeping", total=len(prompts)) as bar:
            rows = strength_effects(
                loaded.model, loaded.tokenizer, prompts[:half], pairs, direction, self.strengths, advance=bar.advance,
                **settings,
            )  # fmt: skip
            strength = chosen_strength(rows, self.wanted)
            test = strength_effects(
                loaded.model, loaded.tokenizer, prompts[half:], pairs, direction, [0.0, strength], advance=bar.advance,
                **settings,
            )  # fmt: skip
        probabilities = [sum(r["target_prob"] for r in rows if r["strength"] == s) / half for s in self.strengths]
        write_scalars(run.path / "tensorboard" / "sweep", "steering/target_prob", probabilities)
        reached = not shortfall(rows, strength, self.wanted)
        calibrated = {
            **settings, "strength": strength, "concept": self.concept, "wanted": self.wanted, "reached": reached,
        }  # fmt: skip
        atomic_write_text(folder / "calibrated.json", json.dumps(calibrated, indent=2) + "\n")
        return {"rows": rows, "test": test, "strength": strength, "label": loaded.label, "pairs": len(pairs)}

    def result(self, run: RunFolder, swept: dict[str, Any]) -> RecipeResult:
        """The curve, the choice and its confirmation."""
        from lightning_interp.core.measure.statistics import counted

        from ._calibrate import calibration_figure, shortfall, summarised
        from ._common import TERMS, concept_term

        curve, test = summarised(swept["rows"]), summarised(swept["test"])
        chosen, there, missed = (
            test[-1],
            test[-1]["target_prob"],
            shortfall(swept["rows"], swept["strength"], self.wanted),
        )
        if missed:
            print(missed)
        dual, holds = self.method == "dual", "holds" if there.low <= self.wanted <= there.high else "does not hold"
        name = "KL budget (nats)" if dual else "strength"
        title = f"{swept['label']}, {self.concept}, {self.method}: {name} {swept['strength']:.3g}"
        table = [
            {"half": half, name: row["strength"], "P(W=1)": str(row["target_prob"]), "KL": str(row["kl"]),
             "pair mass": str(row["pair_mass"]), "prompts": row["kl"].n}
            for half, rows in (("test, chosen", [chosen]), ("validation", curve))
            for row in rows
        ]  # fmt: skip
        return RecipeResult(
            metrics={
                "strength": swept["strength"], "wanted": self.wanted, "reached": not missed,
                "test": {key: chosen[key].to_dict() for key in ("target_prob", "kl", "pair_mass")},
            },
            tables={"strengths": table, "prompts": swept["rows"], "test": swept["test"]},
            figures={"curve": calibration_figure(curve, chosen, self.wanted, across=name, title=title)},
            artifacts={"calibrated": run.folder("sweep") / "calibrated.json"},
            question=f"How strong must steering be for {self.concept!r} to have probability {self.wanted:g}?",
            findings=[
                *([missed] if missed else []),
                f"With a {'KL budget' if dual else 'strength'} of {swept['strength']:.3g}{' nats' if dual else ''} the "
                f"concept's probability P(W=1) is {there} on average over {counted(there.n, 'prompt')} that it was "
                f"not chosen on; unsteered it is {test[0]['target_prob']}. Wanted was {self.wanted:g}, which the "
                f"interval {holds}.",
                f"That costs {chosen['kl']} nats of KL divergence a prompt.",
            ],
            captions={
                "curve": "The line is the mean over the prompts that the strength was chosen on, with its 95 % "
                "interval; the diamond is the chosen strength on the other prompts, the dashed line what was wanted. "
                "See whether the diamond lies on both: then the choice holds for prompts that it was not made on."
            },
            terms=concept_term(self.concept, swept["pairs"])
            | {"P(W=1)": TERMS["P(W=1)"] + " (target_prob)", "KL": TERMS["KL"]}
            | {"pair mass": TERMS["pair_mass"], "[a, b]": TERMS["[a, b]"] + " over prompts"},
            caveats=[
                f"Chosen on {counted(curve[0]['kl'].n, 'prompt')}, confirmed on {counted(there.n, 'other')}; "
                "intervals are over prompts.",
                "The mean over prompts is calibrated, not each prompt.",
                f"One model, {swept['label']}, and one concept; P(W=1) at the last token alone.",
            ],
            summary="strengths",
        )  # fmt: skip
