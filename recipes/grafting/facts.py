"""Where is a finetuned fact read from?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

if TYPE_CHECKING:
    from lightning_interp.grafting import GraftResult

TRAINED, HELD_OUT = "statement", "held out"
ASKED = (TRAINED, "question", HELD_OUT)
SEEDS = (0, 1)


@dataclass(kw_only=True)
class GraftFacts(Recipe):
    """Finetune a language model on invented facts, then graft its weights token by token into the model it came from.

    Eight plans are compared on each prompt: the plain model (PRE), the finetuned one (SFT), finetuned weights only at
    the first entity (FE), only at the last token (LT), at both, and everywhere but there (^C). If FE+LT answers like
    SFT and its complement like PRE, the fact is written at the entity and fetched at the last token, nowhere else.
    """

    facts: int = 16
    """Number of invented pairs; the unit of every interval."""
    mode: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights (which keeps a second copy of them)."""
    rank: int = 16
    """Rank of the adapter, on every linear map; alpha is twice the rank."""
    epochs: int = 6
    """Passes over the texts (four wordings, two of them in both orders)."""
    batch_size: int = 8
    """Texts a step."""
    lr: float | None = None
    """Learning rate; by default 1e-3 for an adapter, 1e-4 for all weights."""
    watch_every: int = 3
    """Epochs between graft scores during training."""
    components: str = "PAPER_ALL"
    """What is grafted at the chosen tokens; see lightning_interp.grafting.GROUPS."""
    head: Literal["recipient", "donor", "follow"] = "recipient"
    """Whose unembedding makes the logits of a graft."""
    final_norm: Literal["recipient", "donor", "follow"] = "recipient"
    """The same for the norm before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoke:
            self.facts, self.epochs, self.watch_every = min(self.facts, 4), min(self.epochs, 2), 1

    def study(self, run: RunFolder) -> RecipeResult:
        """Invent facts, train, graft, report."""
        run.phase("facts", self.write_facts)
        trained = run.phase("train", lambda folder: self.train(run, folder), every_rank=True)
        scored = run.phase("graft", lambda folder: self.graft(run, folder))
        return self.result(run, trained, scored)

    def write_facts(self, folder: Path) -> dict[str, Any]:
        """Write the facts and the training texts."""
        from ._common import write_facts

        return write_facts(folder, self.facts, seed=self.seed)

    def train(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Finetune, with graft scores before and during training; goes on at the last checkpoint."""
        from lightning_interp import GraftCallback, LoraSettings, Optimisation

        from ._common import asked, finetune

        lora = LoraSettings(r=self.rank, alpha=2 * self.rank) if self.mode == "lora" else None
        lr = self.lr if self.lr is not None else (1e-3 if lora else 1e-4)
        watch = GraftCallback(asked(run, [TRAINED]), plans=self.plans(), every_n_epochs=self.watch_every)
        told = finetune(
            self,
            run,
            folder,
            run.folder("facts") / "train.jsonl",
            epochs=self.epochs,
            optimisation=Optimisation(lr=lr, schedule="linear"),
            batch_size=self.batch_size,
            lora=lora,
            callbacks=[watch],
        )
        return {"history": watch.history, **told}

    def graft(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Score every plan on every prompt form, the held-out one too."""
        from lightning_interp import GraftEvaluator, load_causal_lm

        from ._common import asked, evaluate

        recipient = load_causal_lm(self.source)
        tuned = load_causal_lm(str(run.folder("train") / "model"))
        model, donor = (tuned.model, "default") if self.mode == "lora" else (recipient.model, tuned.model)
        evaluator = GraftEvaluator(asked(run, ASKED), recipient.tokenizer, plans=self.plans())
        found = evaluate(run, evaluator, model, donor)
        plans = {name: plan for group in self.experiments().values() for name, plan in group.items()}
        more = GraftEvaluator(asked(run, [TRAINED]), recipient.tokenizer, plans=plans)
        other = evaluate(run, more, model, donor, "more experiments")
        return {"result": asdict(found), "experiments": asdict(other), "label": recipient.label}

    def result(self, run: RunFolder, trained: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
        """Tables with intervals over facts, two figures, and what they may not be used for."""
        from lightning_interp.grafting import GraftResult

        from ._common import compact_groups, dropped_rows, metrics_of
        from ._explained import DOSE_CAPTION, PLANS_CAPTION, TRAINING_CAPTION, dropped_note, findings, terms
        from ._figures import curves_figure, dose_figure, plans_figure

        found, more = GraftResult(**scored["result"]), GraftResult(**scored["experiments"])
        curve = dropout_curve(more)
        title = f"{scored['label']}, finetuned on {self.facts} invented facts ({self.mode})"
        return RecipeResult(
            metrics={
                "forms": metrics_of(found),
                "experiments": metrics_of(more),
                "dropped": len(found.dropped),
                "train_loss": trained["loss"],
            },
            tables={
                "plans": [with_held_out(found, plan) for plan in found.plans],
                "experiments": compact_groups(more, self.experiments()),
                "dropout": [{"share dropped": row["dose"], **row["probability"]} for row in curve],
                "plans_by_form": [row for form in found.forms() for row in found.summary(form=form)],
                "prompts": found.rows,
                "prompts_experiments": more.rows,
                "dropped": dropped_rows(found),
                "training": trained["history"],
            },
            figures={
                "plans": plans_figure(found, forms=[TRAINED, HELD_OUT], title=title),
                "dropout": dose_figure(curve, across="share of grafted layers left out at FE and LT"),
                "training": curves_figure(trained["history"], title=f"form {TRAINED!r}, mean over facts"),
            },
            artifacts={"finetuned": run.folder("train") / "model"},
            question="Which weights, used at which token, retrieve a finetuned fact?",
            findings=findings(found, form=TRAINED),
            captions={"plans": PLANS_CAPTION, "dropout": DOSE_CAPTION, "training": TRAINING_CAPTION},
            terms=terms([*found.plans, *more.plans])
            | {"E3, E4, E7, E8, E10": "experiments of the paper by their number; what each is about stands beside it"},
            caveats=[
                f"One model, {scored['label']}: another may differ.",
                f"{self.facts} invented facts, one training run, one seed: the intervals are over facts only.",
                "The facts were trained on; this measures how they are retrieved, not what the model generalises.",
                "The target is the first token of the second name. Top-5 flatters: read it beside the probability.",
                f"Grafts use the {self.head}'s unembedding and the {self.final_norm}'s final norm; SFT is the whole "
                "model.",
                "Graft dropout is drawn anew for each position and averaged over two seeds, which is few.",
                *dropped_note(found),
            ],
        )

    def plans(self) -> dict[str, Any]:
        """The eight standard plans with this recipe's components and switches."""
        from lightning_interp import paper_plans

        return dict(paper_plans(components=self.components, head=self.head, final_norm=self.final_norm))

    def experiments(self) -> dict[str, dict[str, Any]]:
        """Further plans by experiment: other tokens, heads, depth, redundancy, static weights, activations."""
        from lightning_interp.grafting import carrier_plans, dropout_plans, head_plans, layer_plans, static_plans
        from lightning_interp.grafting.patching import patch_plans

        standard = self.plans()
        return {
            "E3 relation tokens": carrier_plans(title=None, components=self.components),
            "E4 head": head_plans({name: standard[name] for name in ("LT", "FE+LT")}),
            "E7 depth": layer_plans(ranges=["lower_half", "upper_half"]),
            "E8 graft dropout": dropout_plans(seeds=SEEDS),
            "E10 static weights": static_plans(),
            "E10 activations": dict(patch_plans(ranges=["all"])),
        }


def with_held_out(found: GraftResult, plan: str) -> dict[str, Any]:
    """One printed row: the trained prompt form, and the held-out one's accuracy."""
    from ._common import compact

    row = compact(found, plan, form=TRAINED)
    return {
        **{key: value for key, value in row.items() if key != "facts"},
        "held-out top-5": str(found.estimate(plan, "top5", form=HELD_OUT)),
        "facts": row["facts"],
    }


def dropout_curve(more: GraftResult) -> list[dict[str, Any]]:
    """Probability of the target against the share of layers left out, averaged over the seeds."""
    from lightning_interp.core.measure.statistics import mean_interval

    rows = []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        seeds = [more.values(f"p={share:g} #{seed}", "target_prob") for seed in SEEDS]
        estimate = mean_interval([sum(values) / len(values) for values in zip(*seeds, strict=True)])
        rows.append({"dose": share, "probability": estimate.to_dict()})
    return rows
