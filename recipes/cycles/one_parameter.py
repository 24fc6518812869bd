"""Generation cycles of a policy with one parameter: what a trainer that lowers its loss does to a trait; no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class OneParameterCycles(Recipe):
    """Ask in which settings of training on own outputs a trait grows, holds or fades, before any model is trained.

    The policy shows the trait or does not, with one probability. It is finetuned on its own outputs (SFT), or prefers
    them to the base's (DPO), from the base anew in each cycle or from where the last one ended. Each setting is
    followed with the expected loss, and in chains of finitely many outputs, which go through the report of real chains.
    """

    model: str = "smollm2-135m-instruct"
    """Not used: the policy has one parameter."""
    cycles: int = 7
    """Models of a chain, that of cycle 0 included; under five there is no class."""
    base: float = 0.1
    """How often the base shows the trait."""
    start: float = 0.3
    """How often the model of cycle 0 does."""
    sft_lrs: list[float] = field(default_factory=lambda: [0.1])
    """Learning rates of SFT."""
    sft_steps: list[int] = field(default_factory=lambda: [20, 100, 2000])
    """Steps of gradient descent a cycle of SFT: its budget."""
    dpo_lrs: list[float] = field(default_factory=lambda: [0.5, 2.0, 8.0])
    """Learning rates of DPO."""
    dpo_steps: list[int] = field(default_factory=lambda: [50])
    """Steps a cycle of DPO."""
    betas: list[float] = field(default_factory=lambda: [0.1])
    """Of DPO: how little it may leave its reference."""
    samples: int = 64
    """Outputs, or pairs of them, that a cycle of a sampled chain is trained on."""
    chains: int = 30
    """Sampled chains of each setting; at least 2."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.chains, self.sft_steps = min(self.chains, 3), self.sft_steps[:2]
        if self.chains < 2 or self.samples < 1:
            raise RecipeError(f"chains={self.chains}, samples={self.samples}: expected at least 2 chains and 1 sample.")
        if not self.settings():
            raise RecipeError("No setting is left: give sft_lrs and sft_steps, or dpo_lrs, dpo_steps and betas.")
        if self.trainer or self.model not in (type(self).model, self.smoke_model):
            raise RecipeError(
                f"cycles/one_parameter has no use for model={self.model!r} and trainer={self.trainer}: its policy has "
                "one parameter. Leave both out."
            )

    def settings(self) -> dict[str, Any]:
        """How each arm is trained, by its name; reinit after its continual twin."""
        from ._one_parameter import arms

        return arms(self)

    def study(self, run: RunFolder) -> RecipeResult:
        """Follow the expected loss, then sampled chains; report."""
        expected = run.phase("expected", lambda folder: self.expected(run))
        sampled = run.phase("sampled", lambda folder: self.sampled(run))
        return self.result(expected, sampled)

    def expected(self, run: RunFolder) -> dict[str, list[float]]:
        """Probability of the trait by cycle, of infinitely many outputs."""
        from lightning_interp.cycles import one_parameter_chains
        from lightning_interp.running.results import write_scalars

        found = {name: one_parameter_chains(how)[0].tolist() for name, how in self.settings().items()}
        for name, curve in found.items():
            write_scalars(run.path / "tensorboard" / "expected", f"probability/{name}", curve)
        return found

    def sampled(self, run: RunFolder) -> dict[str, list[list[float]]]:
        """The same of chains with finitely many outputs; twins share their seed."""
        from lightning_interp.cycles import one_parameter_chains

        found, settings = {}, self.settings()
        with run.progress("chains", total=len(settings)) as bar:
            for name, how in settings.items():
                chains = one_parameter_chains(how, samples=self.samples, chains=self.chains, seed=self.seed)
                found[name] = chains.tolist()
                bar.advance(1)
        return found

    def result(self, expected: dict[str, list[float]], sampled: dict[str, list[list[float]]]) -> RecipeResult:
        """Tables, figures and sentences."""
        from ._common import TERMS
        from ._one_parameter import expected_rows, findings, probability_figure, report_of

        settings, report = self.settings(), report_of(sampled, base=self.base, seed=self.seed)
        title = f"base {self.base:g}, start {self.start:g}; {self.chains} chains of {self.samples} outputs a cycle"
        return RecipeResult(
            metrics={"expected": expected, "sampled": report.metrics()},
            tables={"expected": expected_rows(settings, expected), **report.tables()},
            figures={
                "probability": probability_figure(expected, sampled, base=self.base, title=title),
                **report.figures(title),
            },
            question="On its own outputs, in which settings does a policy of one parameter gain, keep or lose a trait?",
            findings=findings(settings, expected, report, self.samples),
            captions={
                "probability": "How often the policy shows the trait, by cycle: dashed with the expected loss, solid "
                "the mean of sampled chains with its 95 % interval; dotted the base. See where blue (continual) leaves "
                "orange (reinit), and where reinit grows too.",
                **report.captions(),
            },
            terms=TERMS | _TERMS,
            caveats=[*self.about(), *report.caveats()],
            summary="expected",
        )  # fmt: skip

    @property
    def used_model(self) -> str:
        """None: the policy has one parameter."""
        return ""

    def about(self) -> list[str]:
        """What the numbers rest on."""
        return [
            *(["A smoke run: the numbers mean nothing."] if self.smoke else []),
            "A policy of one parameter has no prompts, no coherence to lose and no other traits. It says what the loss "
            "asks for, not what a language model does.",
            "Its score, 100 times its probability, is read without error: intervals are over chains alone.",
            "Gradient descent is plain. Steps of Adam do not shrink with the gradient, and a budget of them means "
            "something else.",
            "A score that is at its ceiling after cycle 1 cannot rise any more: against cycle 1 it is constant.",
        ]


_TERMS = {
    "SFT": "finetuning on own outputs: lowers the cross-entropy to the outputs of the model before",
    "DPO": "preferring own outputs to the base's, with the start of the cycle as the reference",
    "continual, reinit": "each cycle starts where the last one ended, or at the base",
    "lr, steps": "of gradient descent in a cycle; beta of DPO",
    "gain near the base": "what a cycle multiplies a small distance from the base by, in log-odds",
    "p0, p1, ...": "probability of the trait after each cycle, with the expected loss",
    "trend": "whether the last of them lies above (grows), below (fades) or within 0.005 of the first (holds)",
}
