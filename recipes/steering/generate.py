"""What does a generation lose when every token is steered by the same amount: dual, Euclidean, and not steered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

_MEASURED = {
    "pair_share": "The share of target tokens among the written tokens of pairs",
    "perplexity": "The perplexity of what was written",
}
Method = Literal["unsteered", "dual", "euclidean"]
METHODS: tuple[Method, ...] = ("unsteered", "dual", "euclidean")


@dataclass(kw_only=True)
class SteeredGeneration(Recipe):
    """Let a model write under a budget of KL divergence a token, spent on one concept in two geometries.

    The direction is the mean difference of the unembedding's rows of the concept's two sides. Both methods spend the
    same KL at every token that is steered, so they differ in what they buy with it. Quality is measured with the model
    that is not steered, as under its own distribution a steered model is always fluent.
    """

    concept: str = "capitalised"
    """Kind of token pairs (capitalised, number_digit, verb_ing, verb_past, verb_third, letters), or a JSON file."""
    prompts: str = ""
    """File with one prompt a line, or JSONL with text; by default a few of ours."""
    kl_budget: float = 0.3
    """Nats that each steered token may cost."""
    new_tokens: int = 32
    """Tokens that are written after each prompt."""
    gate: Literal["none", "pair_mass", "entropy"] = "pair_mass"
    """Which tokens are steered: all, those at which the concept matters, or those that are undecided."""
    above: float = 0.2
    """Threshold of the gate: a probability, or nats."""
    alpha: float | None = None
    """Regularisation; by default five times the unembedding's mean variance."""
    temperature: float = 0.0
    """0 writes greedily; else samples, with the recipe's seed."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.kl_budget <= 0 or self.new_tokens < 2 or self.temperature < 0:
            raise RecipeError(
                f"kl_budget={self.kl_budget}, new_tokens={self.new_tokens}, temperature={self.temperature}: expected a "
                "budget > 0, at least 2 tokens and a temperature >= 0."
            )
        if self.smoke:
            self.concept, self.new_tokens, self.gate = "letters", 3, "none"

    def study(self, run: RunFolder) -> RecipeResult:
        """Write with each method, measure, report."""
        written: dict[str, Any] = {method: run.phase(method, partial(self.write, run, method)) for method in METHODS}
        return self.result(run, written)

    def write(self, run: RunFolder, method: Method, folder: Path) -> dict[str, Any]:
        """Generate with one method and measure what was written."""
        from lightning_interp import load_causal_lm
        from lightning_interp.running.results import write_scalars

        from ._common import concept_direction, concept_pairs, read_texts
        from ._generate import PROMPTS, measured_generation

        loaded = load_causal_lm(self.source)
        pairs = concept_pairs(loaded.tokenizer, self.concept)
        prompts = read_texts(self.prompts) if self.prompts else list(PROMPTS)
        steering = None
        if method != "unsteered":
            steering = self.steering(concept_direction(loaded.model, pairs), pairs, method)
        with run.progress(f"writing, {method}", total=len(prompts)) as bar:
            rows = measured_generation(
                loaded.model, loaded.tokenizer, prompts, pairs, steering, new_tokens=self.new_tokens,
                temperature=self.temperature, seed=self.seed, advance=bar.advance,
            )  # fmt: skip
        write_scalars(run.path / "tensorboard" / method, "steering/pair_share", [row["pair_share"] for row in rows])
        meter = {} if steering is None else steering.meter.compute()
        return {"rows": rows, "meter": meter, "label": loaded.label, "pairs": len(pairs)}

    def steering(self, direction: Any, pairs: Any, method: Literal["dual", "euclidean"]) -> Any:
        """The intervention of a method."""
        from lightning_interp import Last
        from lightning_interp.steering import DualSteering, EntropyGate, PairMassGate

        gates = {"pair_mass": PairMassGate(pairs, above=self.above), "entropy": EntropyGate(above=self.above)}
        where = Last() & gates[self.gate] if self.gate in gates else Last()
        alpha: float | Literal["auto"] = "auto" if self.alpha is None else self.alpha
        return DualSteering(direction, kl_budget=self.kl_budget, method=method, alpha=alpha, positions=where)

    def result(self, run: RunFolder, written: dict[str, Any]) -> RecipeResult:
        """Means over prompts with intervals, and every text."""
        from lightning_interp.core.measure.statistics import counted, mean_interval

        from ._common import TERMS, concept_term, differs
        from ._generate import MEASURES, generation_figure

        estimates = {
            method: {name: mean_interval([row[name] for row in told["rows"]]) for name in MEASURES}
            for method, told in written.items()
        }
        table = [
            {
                "method": method, **{name: str(estimate) for name, estimate in found.items()},
                "KL a steered token": written[method]["meter"].get("kl"),
                "products a steered token": written[method]["meter"].get("hvps_per_token"),
                "steered tokens": written[method]["meter"].get("tokens", 0), "prompts": found["perplexity"].n,
            }
            for method, found in estimates.items()
        ]  # fmt: skip
        label, pairs = written["dual"]["label"], written["dual"]["pairs"]
        gate = f" that the gate ({self.gate}, above {self.above:g}) lets through" if self.gate != "none" else ""
        gaps = {
            name: mean_interval(
                [a[name] - b[name] for a, b in zip(*(written[m]["rows"] for m in ("dual", "euclidean")), strict=True)]
            )
            for name in _MEASURED
        }
        samples = [{"method": method, **row} for method, told in written.items() for row in told["rows"]]
        return RecipeResult(
            metrics={m: {n: e.to_dict() for n, e in found.items()} for m, found in estimates.items()}
            | {"meters": {method: told["meter"] for method, told in written.items()}},
            tables={"methods": table, "texts": samples},
            figures={"methods": generation_figure(estimates, title=f"{label}, {self.concept}: {pairs} pairs")},
            question="What do texts gain and lose when every token spends the same KL on one concept?",
            findings=[
                f"{title} is {estimates['unsteered'][name]} unsteered, {estimates['dual'][name]} with dual and "
                f"{estimates['euclidean'][name]} with Euclidean steering, over {counted(gaps[name].n, 'prompt')}; "
                f"{differs(gaps[name])}."
                for name, title in _MEASURED.items()
            ],
            captions={
                "methods": "A panel is a measure, a bar a method with its 95 % interval over prompts: see what "
                "steering gains (pair share) and what it costs (perplexity, repetition) against the unsteered texts."
            },
            terms=concept_term(self.concept, pairs)
            | {key: TERMS[key] for key in (*METHODS, *MEASURES, "products a steered token", "[a, b]")},
            caveats=[
                "The theorem speaks of one next-token distribution; no published result covers whole generations.",
                f"Budget {self.kl_budget:g} nats at each token{gate}; the methods write different texts, so they meet "
                "different tokens.",
                "Perplexity is that of the unsteered model on what was written; low may also mean repetitive.",
                f"Intervals are over {counted(table[0]['prompts'], 'prompt')}; one direction, one seed, one model "
                f"({label}).",
            ],
            summary="methods",
        )
