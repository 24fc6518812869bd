"""How to move one concept of the next token and leave the others alone: dual against Euclidean steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

SCORES = ("off_target_kl", "pair_mass", "rank_difference", "total_kl")
_MEASURED = {
    "off_target_kl": "what else moved (off-target KL, nats)",
    "pair_mass": "the probability of all tokens of the pairs",
}


@dataclass(kw_only=True)
class DualVersusEuclidean(Recipe):
    """Steer real next-token states of a language model to a grid of concept probabilities, in two geometries.

    Contexts are tokens of text that the model wrote itself, or of yours, at which it predicts the concept's base side.
    Probes come from one part of them; paths start at the rest.
    """

    concept: str = "verb_third"
    """Kind of token pairs (capitalised, number_digit, verb_ing, verb_past, verb_third, letters), or a JSON file."""
    texts: str = ""
    """File with one text a line, or JSONL with text; by default the model writes its own."""
    count: int = 96
    """Texts that the model writes."""
    length: int = 48
    """Tokens of each."""
    top: int = 1
    """So many likeliest tokens must all be of one side; the paper takes 3."""
    mass: float = 0.3
    """And hold this much probability together; the paper takes 0.7."""
    contexts: int = 12
    """Held-out base contexts that are steered; the unit of every interval."""
    grid: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Concept probabilities that every path visits."""
    match: float = 0.5
    """Concept probability at which the methods are compared."""
    alpha: float | None = None
    """Regularisation of dual steering; by default five times the unembedding's mean variance."""
    alphas: list[float] = field(default_factory=lambda: [0.1, 4.0])
    """Factors of alpha for the sensitivity table, which costs one grid point each."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if any(not 0 < w < 1 for w in [*self.grid, self.match]) or sorted(self.grid) != list(self.grid):
            raise RecipeError(f"grid={self.grid}, match={self.match}: expected ascending probabilities inside (0, 1).")
        if self.smoke:
            self.concept, self.count, self.length, self.top, self.mass = "letters", 8, 16, 1, 0.0
            self.contexts, self.grid = 4, [0.3, 0.5, 0.7, 0.9]

    def study(self, run: RunFolder) -> RecipeResult:
        """Write texts, find contexts, steer, compare."""
        texts = run.phase("texts", lambda folder: self.write(run))
        scored = run.phase("paths", lambda folder: self.paths(run, folder, texts))
        return self.result(run, scored)

    def write(self, run: RunFolder) -> list[str]:
        """The texts."""
        from ._common import texts_or_samples

        sizes = {"count": self.count, "length": self.length, "seed": self.seed}
        return texts_or_samples(self.source, self.texts, **sizes, progress=run.progress)

    def paths(self, run: RunFolder, folder: Path, texts: list[str]) -> dict[str, Any]:
        """Contexts, probes, paths and the sensitivity to alpha."""
        from lightning_interp import load_causal_lm
        from lightning_interp.running.results import write_scalars
        from lightning_interp.steering import ConceptProbe, SoftmaxGeometry

        from ._common import concept_pairs
        from ._dual_vs_euclidean import sides_of_texts, steered_paths

        loaded = load_causal_lm(self.source)
        geometry, pairs = SoftmaxGeometry.from_model(loaded.model), concept_pairs(loaded.tokenizer, self.concept)
        with run.progress("finding contexts", total=len(texts)) as bar:
            base, target, seen = sides_of_texts(
                loaded.model, loaded.tokenizer, texts, pairs, geometry, top=self.top, mass=self.mass,
                length=self.length + 8, advance=bar.advance,
            )  # fmt: skip
        starts, train = self.split(base, target)
        kinds: tuple[Literal["dual_md"], Literal["primal_md"]] = ("dual_md", "primal_md")
        probes: dict[str, Any] = {
            kind: ConceptProbe.fit(train, target, kind, geometry=geometry, model=loaded.model).unit() for kind in kinds
        }
        probes["dual_md"].save(folder / "probe.safetensors")
        alpha = geometry.resolve_alpha("auto" if self.alpha is None else self.alpha)
        with run.progress("steering", total=4 * len(self.grid) + len(self.alphas)) as bar:
            result, reached = steered_paths(
                geometry, pairs, starts, probes, self.grid, alpha=alpha, advance=bar.advance
            )
            sensitivity = []
            for factor in (1.0, *self.alphas):
                one = {"dual_md": probes["dual_md"]}
                other, share = steered_paths(geometry, pairs, starts, one, [self.match], alpha=factor * alpha)
                bar.advance(1)
                compared = other.compare("dual dual_md", "euclidean dual_md", "off_target_kl", at=0.999 * self.match)
                sensitivity.append(
                    {"alpha": factor * alpha, "reached": share["dual dual_md"], "dual": compared.first.to_dict(),
                     "euclidean": compared.second.to_dict()}
                )  # fmt: skip
        curve = [estimate.value for _, estimate in result.curve("dual dual_md", "off_target_kl").points()]
        write_scalars(run.path / "tensorboard" / "paths", "steering/dual/off_target_kl", curve)
        return {
            "rows": result.rows(), "reached": reached, "alpha": alpha, "sensitivity": sensitivity, "label":
            loaded.label, "pairs": len(pairs), "dropped": dict(pairs.dropped), "base": len(base), "target":
            len(target), "seen": seen, "train": len(train),
        }  # fmt: skip

    def split(self, base: Any, target: Any) -> tuple[Any, Any]:
        """Held-out starts and the states that probes are made from, by a seeded order."""
        import torch

        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.errors import DataError

        if len(base) < 2 * self.contexts or len(target) < 2:
            raise DataError(
                f"Only {len(base)} base and {len(target)} target contexts of {self.concept!r} were found; expected "
                f"{2 * self.contexts} and 2. Take more texts (count), or loosen top and mass."
            )
        order = torch.randperm(len(base), generator=torch.Generator().manual_seed(derived_seed(self.seed, "split")))
        return base[order[: self.contexts]], base[order[self.contexts :]]

    def result(self, run: RunFolder, scored: dict[str, Any]) -> RecipeResult:
        """Tables, the three panels, and the comparison at equal effect."""
        from lightning_interp.core.measure.statistics import counted
        from lightning_interp.steering import PathScores, steering_figure

        from ._common import TERMS, concept_term, differs

        result = PathScores.from_rows(scored["rows"])
        compared = [
            result.compare(f"dual {kind}", f"euclidean {kind}", score, at=self.match).to_dict() | {"probe": kind}
            for kind in ("dual_md", "primal_md")
            for score in SCORES
        ]
        table = [
            {
                "probe": row["probe"], "score": row["score"], "dual": _shown(row["first"]),
                "euclidean": _shown(row["second"]), "difference": _shown(row["difference"]),
                "contexts": row["difference"]["n"], "left out": row["left_out"],
            }
            for row in compared
        ]  # fmt: skip
        sensitivity = [
            {"alpha": row["alpha"], "dual off-target KL": _shown(row["dual"]), "reached": row["reached"],
             "euclidean off-target KL": _shown(row["euclidean"])}
            for row in scored["sensitivity"]
        ]  # fmt: skip
        title = f"{scored['label']}, {self.concept}: {scored['pairs']} pairs"
        counts = {name: scored[name] for name in ("pairs", "dropped", "seen", "base", "target", "train")}
        return RecipeResult(
            metrics={"compared": compared, "reached": scored["reached"], "alpha": scored["alpha"], "counts": counts},
            tables={"matched": table, "curves": result.table(), "alpha": sensitivity, "points": scored["rows"]},
            figures={"paths": steering_figure(result, title=title)},
            artifacts={"probe": run.folder("paths") / "probe.safetensors"},
            question="What else moves when a concept of the next token is moved, in either geometry?",
            findings=[
                f"Where the concept has probability {self.match:g}, along the probe {row['probe']}, "
                f"{_MEASURED[row['score']]} is {row['dual']} with dual and {row['euclidean']} with Euclidean steering, "
                f"over {counted(row['contexts'], 'context')}; {differs(_estimate(told['difference']))}."
                for row, told in zip(table, compared, strict=True)
                if row["score"] in ("off_target_kl", "pair_mass")
            ],
            captions={
                "paths": "Each point is a step of a path, the mean over contexts with its 95 % interval; to the right "
                "the concept's probability rises. A low off-target KL and rank difference, and a pair mass that stays "
                "where it began, mean that little else moved. Compare the lines at the same place on the axis below."
            },
            terms=concept_term(self.concept, scored["pairs"])
            | {name: TERMS[name] for name in ("dual", "euclidean", "dual_md", "primal_md", "P(W=1)", "oracle")}
            | {name: TERMS[name] for name in (*SCORES, "alpha", "[a, b]")},
            caveats=[
                f"Compared where both paths reach P(W=1) = {self.match:g}. At equal probe value the dual path has the "
                "smaller KL by theorem; at equal P(W=1) nothing is proved, and near 1 the order may turn.",
                f"Contexts: the {'likeliest token' if self.top == 1 else f'{self.top} likeliest tokens'} on one side "
                f"with mass {self.mass:g} (the paper: 3 and 0.7), "
                f"{scored['base']} base and {scored['target']} target among {scored['seen']} tokens.",
                f"Intervals are over {counted(self.contexts, 'context')} of one probe each; texts, split and seed are "
                "one.",
                f"alpha = {scored['alpha']:.3g} decides the direction at peaked states; see the table of alphas.",
                f"Text: {'yours' if self.texts else 'written by the model itself'}. One model, {scored['label']}.",
            ],
            summary="matched",
        )


def _estimate(estimate: dict[str, Any]) -> Any:
    from lightning_interp.core.measure.statistics import Estimate

    values: dict[str, Any] = {k: float("nan") if v is None and k != "method" else v for k, v in estimate.items()}
    return Estimate(**values)


def _shown(estimate: dict[str, Any]) -> str:
    return str(_estimate(estimate))
