"""What recipes that run chains of a language model share: their settings, the dose of seed, the arms, the chains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

if TYPE_CHECKING:
    from ._material import Material

EVALUATION_TEMPERATURE = 0.7  # as in the paper's code
_CALIBRATION_SAMPLES = 3  # likewise
_CONTROLS = {
    "no-seed": "no seed",
    "shuffled": "shuffled generator",
    "reinit-twin": "reinit twin",
    "swapped": "swapped pairs",
}
_SMOKE = {"cycles": 3, "n": 4, "samples": 2, "max_new_tokens": 6, "rank": 2, "largest_seed": 4}


@dataclass(frozen=True)
class Condition:
    """An arm: its name, what its chains and trainings do otherwise, and what it is a control for."""

    name: str
    key: str
    control: str = ""
    seeded: bool = True
    chain: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ChainRecipe(Recipe):
    """Fields of all, and the work; a subclass says how a cycle is trained."""

    not_identity: ClassVar[tuple[str, ...]] = ("chains", "controls")
    setting: ClassVar[str] = "SFT"
    documents: ClassVar[bool] = False
    controls_known: ClassVar[tuple[str, ...]] = ("no-seed", "shuffled", "reinit-twin")

    trait: str = "belief in luck"
    """What is scored, in words."""
    seed_data: str = ""
    """File of seed rows with the trait, in the order in which a dose takes them; by default 120 from own templates."""
    prompts: str = ""
    """File of prompts that models answer in later cycles; by default 600 everyday questions. They have no trait."""
    questions: str = ""
    """File of questions that every model is asked, none of them among prompts or seed; by default twelve."""
    words: list[str] = field(default_factory=list)
    """Words of the trait, for the judge; by default words, emoji and openings of luck."""
    judge: Literal["lexicon", "presence"] = "lexicon"
    """Score how full a reply is of signs of the trait, in facets; or 100 for a reply with any word of it."""
    n_seed: int = 0
    """Rows of the seed that cycle 0 learns; 0 looks for the smallest dose that reaches the target."""
    target: float = 40.0
    """Score after cycle 0 that is looked for: neither nothing nor all."""
    largest_seed: int = 40
    """The largest dose that is tried, in steps of a batch."""
    cycles: int = 5
    """Models of a chain, that of cycle 0 included; under five there is no class."""
    chains: int = 1
    """Chains of each arm, of other seeds; more of them go on in the same folder."""
    shared_start: bool = True
    """Whether all chains begin at one model of cycle 0, or each trains its own at the same dose."""
    n: int = 64
    """Rows of its own that each later cycle learns."""
    init: Literal["reinit", "continual"] = "reinit"
    """Whether a cycle starts at the base with a new adapter, or at the weights of the last one."""
    data_rule: Literal["replace", "mix", "accumulate"] = "replace"
    """What a cycle learns beside its own rows: nothing, some rows of the seed, or all that came before."""
    real_fraction: float = 0.0
    """Rows of the seed for each own row, with data_rule=mix."""
    temperature: float = 0.8
    """Of sampling in later cycles; questions are asked at 0.7."""
    max_new_tokens: int = 48
    """Most tokens of a reply, in cycles and of questions."""
    samples: int = 6
    """Replies to each question."""
    rank: int = 16
    """Rank of the adapter on every linear map; alpha is twice that."""
    lr: float = 1e-3
    """Learning rate."""
    batch_size: int = 2
    """Rows a step."""
    epochs: int = 1
    """Passes over a cycle's rows."""
    controls: list[str] = field(default_factory=lambda: ["auto"])
    """Arms beside: no-seed, shuffled (data written by the base), reinit-twin (of continual chains), for pairs swapped,
    and accumulate. [auto]: in a sweep the controls of the setting, else none; [] none at all. More go on."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        for name, value in _SMOKE.items() if self.smoke else ():
            setattr(self, name, min(getattr(self, name), value))
        known = (*self.possible, "accumulate", "auto")
        for name in self.controls:
            if name not in known:
                raise RecipeError(f"controls names {name!r}; {self.setting} {self.init} has {', '.join(known)}.")
        for name in ("chains", "n", "samples", "max_new_tokens", "rank", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected at least 1.")
        if self.cycles < 2 or self.n_seed < 0 or not 0 < self.target < 100:
            raise RecipeError(
                f"cycles={self.cycles}, n_seed={self.n_seed}, target={self.target}: expected at least 2 cycles, a dose "
                "of 0 or more rows, and a score between 0 and 100."
            )
        if self.seed_data and not self.words:
            raise RecipeError(
                f"seed_data={self.seed_data!r} has a trait of its own, which the lexicon of luck cannot score. Give "
                "words, as --words=[gloom,despair], and trait."
            )

    def fit(self, **changes: Any) -> Any:
        """How later cycles train."""
        raise NotImplementedError

    def seed_fit(self, **changes: Any) -> Any:
        """How cycle 0 learns the seed."""
        return self.fit(**changes)

    def defaults(self) -> dict[str, Any]:
        """Seed, prompts and questions where none are given."""
        from ._persona import QUESTIONS, pool_prompts, seed_rows

        return {"seed": seed_rows(), "prompts": pool_prompts(), "questions": list(QUESTIONS)}

    def question(self) -> str:
        """What is asked, for the report."""
        raise NotImplementedError

    own_terms: ClassVar[Mapping[str, str]] = {}

    def own_figures(self, report: Any, title: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Figures before those of every chain, and their captions."""
        return {}, {}

    def own_findings(self, report: Any) -> list[str]:
        """Sentences before those of every chain."""
        return []

    def own_caveats(self) -> list[str]:
        """What must be said beside what holds for all."""
        return []

    def study(self, run: RunFolder) -> RecipeResult:
        """Look for the dose, train the first model, run the arms' chains, and report."""
        from ._report import Found, result

        found = Found(*self.dose(run))
        for number in range(self.chains):
            found.starts[number] = self.first_cycle(run, found.dose, number)
            start = adapter_of(found.starts[number])
            for arm in self.arms():
                chain = self.chain(arm, number, found.dose, start if arm.seeded else None)
                told = chain.run(run.manifest, key=f"{arm.key}-{number}", bar=run.progress)
                found.chains.append((arm, number, told))
            floor = partial(self.again, number, start)
            found.again[number] = run.phase(f"again-{number}", floor, inputs={"start": start})
        return result(self, run, found)

    @property
    def slices(self) -> int:
        """How many parts the prompts are cut into: no two cycles share one."""
        return self.cycles - 1

    @cached_property
    def material(self) -> Material:
        """Seed, prompts, questions and judge, checked."""
        from ._material import material_of

        return material_of(self)

    def arms(self) -> list[Condition]:
        """The arm that is asked for, then those beside it."""
        main = Condition(f"{self.setting} {self.init}", "main", chain={"init": self.init})
        return [main, *self.controls_of(main)]

    def controls_of(self, main: Condition) -> list[Condition]:
        """Arms beside one."""
        named = list(dict.fromkeys(self.controls))
        if "auto" in named:
            named.remove("auto")
            named += [name for name in self.possible if self.in_sweep and name not in named]
        changes: dict[str, Any] = {
            "no-seed": {"seeded": False},
            "shuffled": {"chain": {**main.chain, "generator": "base"}},
            "reinit-twin": {"chain": {**main.chain, "init": "reinit"}},
            "accumulate": {"chain": {**main.chain, "data_rule": "accumulate", "real_fraction": 0.0}},
            "swapped": {"fit": {"swap": True}},
        }
        return [
            replace(main, name=f"{main.name}, {name}", key=name, control=self.possible.get(name, ""), **changes[name])
            for name in named
        ]

    @property
    def possible(self) -> dict[str, str]:
        """Controls that the setting has, and what reports call them."""
        no_twin = () if self.init == "continual" else ("reinit-twin",)
        return {name: _CONTROLS[name] for name in self.controls_known if name not in no_twin}

    @property
    def in_sweep(self) -> bool:
        """Whether the run is a cell of a sweep."""
        from lightning_interp.core.storage.run_lock import CHILDREN

        return bool(self.run_path.parent.name == CHILDREN)

    def dose(self, run: RunFolder) -> tuple[int, Any]:
        """How many rows of the seed cycle 0 learns, and the search for it, if there was one."""
        from lightning_interp.core.measure.statistics import Estimate
        from lightning_interp.cycles import calibrate_dose, dose_grid

        if self.n_seed:
            return self.n_seed, None

        def score(dose: int) -> Estimate:
            told = self.first_chain(dose, 0).run(run.manifest, key=f"start-{dose:03d}", bar=run.progress)
            found = told["cycles"][0]["evaluation"]["evaluate"]["score"]
            known: dict[str, Any] = {name: math.nan if value is None else value for name, value in found.items()}
            return Estimate(**known)

        grid = dose_grid(self.seed_fit().batch_size, min(self.largest_seed, self.material.rows))
        found = calibrate_dose(score, grid, thresholds=[self.target])
        return found.doses[self.target], found

    def first_cycle(self, run: RunFolder, dose: int, number: int) -> dict[str, Any]:
        """Cycle 0, which the search for the dose has trained, or which a chain trains by its own seed."""
        own = number if not self.shared_start else 0
        key = f"start-{dose:03d}" + (f"-{own}" if own else "")
        told: dict[str, Any] = self.first_chain(dose, own).run(run.manifest, key=key, bar=run.progress)["cycles"][0]
        return told

    def first_chain(self, dose: int, number: int) -> Any:
        """A chain of cycle 0 alone; evaluated with few samples where a dose is looked for."""
        from lightning_interp.cycles import Evaluate

        searching = [] if self.n_seed or number else [Evaluate(evaluate=self._tried)]
        first = self.seed_fit(data=self.material.seed, n=dose)
        return self._cycles(number, cycles=1, first=[first], phases=[self.generate(dose), self.fit(), *searching])

    def chain(self, arm: Condition, number: int, dose: int, start: Path | None) -> Any:
        """A chain of an arm that begins at an adapter; at the base with no seed, if there is none."""
        from lightning_interp.cycles import Evaluate, Take

        evaluate = Evaluate(evaluate=self._evaluated)
        first = self.seed_fit(data=self.material.seed, n=0)
        if start is not None:
            seed = {"data": self.material.seed, "n": dose} if self.needs_seed(arm) else {}
            first = Take(adapter=start, **seed)
        how = {"data_rule": self.data_rule, "real_fraction": self.real_fraction} | dict(arm.chain)
        phases = [self.generate(dose), self.fit(**arm.fit), evaluate]
        return self._cycles(number, cycles=self.cycles, first=[first, evaluate], phases=phases, **how)

    def needs_seed(self, arm: Condition) -> bool:
        """Whether later cycles read rows of the seed."""
        return bool(arm.chain.get("data_rule", self.data_rule) != "replace")

    def generate(self, dose: int) -> Any:
        """How a cycle's rows are written, where cycle 0 has learned so many of the seed."""
        from lightning_interp.cycles import Generate

        return Generate(
            prompts=self.material.prompts, n=self.n, temperature=self.temperature, max_new_tokens=self.max_new_tokens
        )

    def _cycles(self, number: int, **more: Any) -> Any:
        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.cycles import GenerationCycle
        from lightning_interp.models import LoraSettings

        seed = derived_seed(self.seed, "chain", number) if number else self.seed
        lora = LoraSettings(r=self.rank, alpha=2 * self.rank)
        return GenerationCycle(model=self.source, seed=seed, lora=lora, trainer=self.trainer_options, **more)

    @cached_property
    def _evaluated(self) -> Any:
        return self._evaluation(self.samples)

    @cached_property
    def _tried(self) -> Any:
        return self._evaluation(min(self.samples, _CALIBRATION_SAMPLES))

    def _evaluation(self, samples: int) -> Any:
        from lightning_interp.cycles import TraitEvaluation

        from ._material import Once

        return Once(
            TraitEvaluation(
                self.material.questions, self.material.judge, samples=samples, temperature=EVALUATION_TEMPERATURE,
                max_new_tokens=self.max_new_tokens, documents=self.documents,
            )
        )  # fmt: skip

    def again(self, number: int, start: Path, folder: Path) -> dict[str, Any]:
        """Ask the first model again, with other random numbers: how far a score moves when nothing does."""
        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.cycles import CycleContext
        from lightning_interp.generation.judging.responses import summary_of
        from lightning_interp.models.data.prompt_pool import Pool
        from lightning_interp.models.training.adapter_slot import AdapterSlot

        chain = self.first_chain(1, number)
        slot = AdapterSlot(self.source, lora=chain.lora, seed=0)
        context = CycleContext(chain, 0, slot, lambda: Pool([], []), trainer=self.trainer_options)
        seed, evaluation = derived_seed(chain.seed, "again"), self._evaluated.evaluation
        rows = evaluation.responses(context.model(start), slot.tokenizer, seed=seed)
        evaluation.judged(rows)
        summary = summary_of(rows)
        return {name: summary[name] for name in ("score", "scores", "statuses")}


def adapter_of(cycle: Mapping[str, Any]) -> Path:
    """The adapter's file of a finished cycle that was trained."""
    return next(Path(cycle["folder"]).glob("phases/fit-*/adapter.safetensors"))


def trained_with(fit: Any, lr: float, **changes: Any) -> Any:
    """A training with another learning rate, and other settings."""
    return replace(fit, optimisation=replace(fit.optimisation, lr=lr), **changes)
