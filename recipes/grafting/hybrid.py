"""Is recall task attention or relation extraction? Two adapters on one base, grafted into one token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

FORMS = ("statement", "casting", "question", "poster")
ASKED = ("statement",)
TASK, RELATION = "one order", "both orders"


@dataclass(kw_only=True)
class GraftHybrid(Recipe):
    """Train one adapter on facts in both orders and one on the reversed order only, then graft parts of both.

    The model that read "B stars with A" only has seen the task and both people, but seldom completes "A stars with":
    it is the task model; the one that read both orders is the relation model. Sets of components of the relation model
    are grafted into the task model at the last token (E5), and the task model's attention with the relation model's
    feed-forward maps into the untouched base (E6), in the intended construction and in that of the released code.
    """

    facts: int = 16
    """Number of invented pairs; the unit of every interval."""
    rank: int = 16
    """Rank of both adapters, on every linear map; alpha is twice the rank."""
    epochs: int = 6
    """Passes over the texts; the one-order texts are half as many and are read twice as often."""
    batch_size: int = 8
    """Texts a step."""
    lr: float = 1e-3
    """Learning rate."""
    watch_every: int = 3
    """Epochs between graft scores while the relation model trains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoke:
            self.facts, self.epochs, self.watch_every = min(self.facts, 4), min(self.epochs, 2), 1

    def study(self, run: RunFolder) -> RecipeResult:
        """Invent facts, train both adapters, graft, report."""
        run.phase("facts", self.write_facts)
        both = run.phase("both", lambda folder: self.train(run, folder, "both"), every_rank=True)
        one = run.phase("one", lambda folder: self.train(run, folder, "one"), every_rank=True)
        scored = run.phase("graft", lambda folder: self.graft(run, folder))
        return self.result(run, {"both": both, "one": one}, scored)

    def write_facts(self, folder: Path) -> dict[str, Any]:
        """Write the facts, the texts in both orders, and those in the reversed order."""
        from ._common import make_facts, order_texts, write_jsonl

        facts = make_facts(self.facts, seed=self.seed)
        reversed_order = order_texts(facts, forms=FORMS, reverse=True)
        texts = {"both": order_texts(facts, forms=FORMS) + reversed_order, "one": reversed_order}
        return write_jsonl(folder, {"facts": facts, **texts})

    def train(self, run: RunFolder, folder: Path, which: str) -> dict[str, Any]:
        """Finetune one adapter on its texts."""
        from lightning_interp import GraftCallback, LoraSettings, Optimisation

        from ._common import asked, finetune

        watch = GraftCallback(asked(run, ASKED), every_n_epochs=self.watch_every) if which == "both" else None
        told = finetune(
            self,
            run,
            folder,
            run.folder("facts") / f"{which}.jsonl",
            epochs=self.epochs * (1 if which == "both" else 2),
            optimisation=Optimisation(lr=self.lr, schedule="linear"),
            batch_size=self.batch_size,
            lora=LoraSettings(r=self.rank, alpha=2 * self.rank),
            callbacks=[watch] if watch else [],
        )
        return {**told, "history": watch.history if watch else []}

    def graft(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Put both adapters on one base and score every plan."""
        from lightning_interp import GraftEvaluator, load_causal_lm
        from lightning_interp.models.sources.adapters import attach_adapter_folder

        from ._common import asked, evaluate

        base = load_causal_lm(self.source)
        for name in ("one", "both"):
            attach_adapter_folder(base.model, run.folder(name) / "model", name=name)
        plans = {name: plan for group in self.experiments().values() for name, plan in group.items()}
        evaluator = GraftEvaluator(asked(run, ASKED), base.tokenizer, plans=plans)  # in the order the task never read
        found = evaluate(run, evaluator, base.model, {"task": "one", "relation": "both"})
        return {"result": asdict(found), "label": base.label}

    def result(self, run: RunFolder, trained: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
        """One table of all plans, with the measured reversal."""
        from lightning_interp.core.measure.statistics import counted
        from lightning_interp.grafting import GraftResult

        from ._common import compact_groups, dropped_rows, metrics_of
        from ._explained import PLANS_CAPTION, TRAINING_CAPTION, best_of, dropped_note, terms
        from ._figures import curves_figure, plans_figure

        found = GraftResult(**scored["result"])
        title = f"{scored['label']}: task model {TASK!r}, relation model {RELATION!r}"
        return RecipeResult(
            metrics={
                "forms": metrics_of(found),
                "dropped": len(found.dropped),
                "train_loss": {name: told["loss"] for name, told in trained.items()},
            },
            tables={
                "plans": compact_groups(found, self.experiments()),
                "prompts": found.rows,
                "dropped": dropped_rows(found),
                "training": trained["both"]["history"],
            },
            figures={
                "plans": plans_figure(found, title=title),
                "training": curves_figure(trained["both"]["history"], title="relation model, while it trains"),
            },
            artifacts={name: run.folder(name) / "model" for name in ("one", "both")},
            question="Is recall at the last token task attention, or extraction by output and feed-forward maps?",
            findings=[
                f"The model that read both orders has the answer among its {found.top_k} likeliest tokens for a share "
                f"of {found.estimate('SFT', 'top5')} of the {counted(len(found.values('SFT', 'top5')), 'fact')}, the "
                f"one that read one order for {found.estimate(TASK, 'top5')}, the base for "
                f"{found.estimate('PRE', 'top5')}.",
                *(best_of(found, group, what) for what, group in self.groups().items()),
            ],
            captions={
                "plans": PLANS_CAPTION.partition("See")[0] + "See which are as long as SFT's.",
                "training": TRAINING_CAPTION,
            },
            terms=terms(["PRE", "SFT", "FE", "LT", "ATTN+O+FFN", "(FE+LT)^C"])
            | {
                TASK: "the task model: it read the facts in one order alone, and is asked in the other",
                "E5": "the task model, with parts of the relation model (which read both orders) at the last token",
                "E6": "a hybrid: the base, with the task model's attention and the relation model's other maps at the "
                "last token ('LT only'), and at the entity parts of the task model ('FE task ...', FULL: all of them); "
                "'intended' as the paper describes it, 'literal' as its code does it",
            },
            caveats=[
                f"One model, {scored['label']}: another may differ.",
                f"{self.facts} invented facts, one training run of each adapter, one seed: intervals are over facts "
                "only.",
                f"How far the reversal holds is measured, not assumed: top-5 of the one-order model on the untrained "
                f"order is {found.estimate(TASK, 'top5')}, of the both-orders model {found.estimate('SFT', 'top5')}.",
                "The two adapters differ in more than the tested order: each is a training run of its own.",
                "Recovery is from the base (PRE) to the both-orders model (SFT).",
                *dropped_note(found),
            ],
        )

    def groups(self) -> dict[str, list[str]]:
        """The plans that are compared with each other, by what they are."""
        groups = {"E5 component sets": "sets of components on the task model", "E6 hybrid": "hybrids on the base"}
        return {what: list(self.experiments()[name]) for name, what in groups.items()}

    def experiments(self) -> dict[str, dict[str, Any]]:
        """Baselines, E5 on the task model, and E6 on the base in both constructions."""
        from lightning_interp import All, GraftPlan, GraftRule, Last
        from lightning_interp.grafting import hybrid_plans
        from lightning_interp.grafting.experiments import COMPONENT_SETS

        task = GraftRule(All(), ("PAPER_ALL",), source="task")  # the recipient of E5, written as the first rule
        sets = {
            f"E5 {name}": GraftPlan((task, GraftRule(Last(), parts, "upper_half", "relation", adds=True)))
            for name, parts in COMPONENT_SETS.items()
        }
        hybrids = {
            f"E6 {name}, {kind}": plan
            for kind in ("intended", "literal")
            for name, plan in hybrid_plans(construction=kind).items()
        }
        ends = {"PRE": GraftPlan(), TASK: GraftPlan.whole("task"), "SFT": GraftPlan.whole("relation")}
        return {"models": ends, "E5 component sets": sets, "E6 hybrid": hybrids}
