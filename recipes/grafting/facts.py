"""Where is a finetuned fact read from?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

if TYPE_CHECKING:
    from lightning_interp.grafting import GraftResult

TRAINED, HELD_OUT = "statement", "held out"
ASKED = (TRAINED, "question", HELD_OUT)


@dataclass(kw_only=True)
class GraftFacts(Recipe):
    """Finetune a language model on invented facts, then graft its weights token by token into the model it came from.

    Eight plans are compared on each prompt: the plain model (PRE), the finetuned one (SFT), finetuned weights only at
    the
    first entity (FE), only at the last token (LT), at both, and everywhere but there (^C). If FE+LT answers like SFT
    and
    its complement like PRE, the fact is written at the entity and fetched at the last token, and nowhere else.
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
        from lightning_interp.core.files import atomic_write_text
        from lightning_interp.grafting.facts import fact_texts, make_facts

        facts = make_facts(self.facts, seed=self.seed)
        rows = {"facts": [asdict(fact) for fact in facts], "train": fact_texts(facts)}
        for name, lines in rows.items():
            atomic_write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return {"facts": len(facts), "texts": len(rows["train"])}

    def train(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Finetune, with graft scores before and during training; goes on at the last checkpoint."""
        import lightning as L
        from lightning.pytorch.callbacks import ModelCheckpoint

        from lightning_interp import CausalLM, GraftCallback, LoraSettings, TextDataModule
        from lightning_interp.grafting.facts import fact_prompts

        lora = LoraSettings(r=self.rank, alpha=2 * self.rank) if self.mode == "lora" else None
        rate = self.lr if self.lr is not None else (1e-3 if lora else 1e-4)
        module = CausalLM(self.source, lora=lora, lr=rate, schedule="linear", seed=self.seed)
        texts = run.folder("facts") / "train.jsonl"
        data = TextDataModule(
            texts, tokenizer=module.tokenizer, batch_size=self.batch_size, seed=self.seed, add_eos=False
        )
        prompts = fact_prompts(self.invented(run), forms=[TRAINED])
        watch = GraftCallback(prompts, plans=self.plans(), every_n_epochs=self.watch_every)
        # One file, the newest. save_last alone (save_top_k=0) writes nothing before the end of training.
        keep = ModelCheckpoint(folder / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False)
        trainer = L.Trainer(
            **self.trainer_kwargs(
                run, max_epochs=self.epochs, log_every_n_steps=1, gradient_clip_val=1.0, callbacks=[watch, keep]
            )
        )
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
        if trainer.is_global_zero:
            module.export(folder / "model")
        trainer.strategy.barrier()
        return {"history": watch.history, "loss": float(trainer.callback_metrics["train/loss"])}

    def graft(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Score every plan on every prompt form, the held-out one too."""
        from lightning_interp import GraftEvaluator, load_causal_lm
        from lightning_interp.grafting.facts import fact_prompts

        recipient = load_causal_lm(self.source)
        tuned = load_causal_lm(str(run.folder("train") / "model"))
        model, donor = (tuned.model, "default") if self.mode == "lora" else (recipient.model, tuned.model)
        evaluator = GraftEvaluator(
            fact_prompts(self.invented(run), forms=ASKED), recipient.tokenizer, plans=self.plans()
        )
        with run.progress("grafting", total=len(evaluator)) as bar:
            found = evaluator.evaluate(model, donor, advance=bar.advance)
        return {"result": asdict(found), "label": recipient.label}

    def result(self, run: RunFolder, trained: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
        """Tables with intervals over facts, two figures, and what they may not be used for."""
        from lightning_interp.grafting import GraftResult
        from lightning_interp.grafting.figures import curves_figure, plans_figure

        found = GraftResult(**scored["result"])
        title = f"{scored['label']}, finetuned on {self.facts} invented facts ({self.mode})"
        main = [compact(found, plan) for plan in found.plans]
        return RecipeResult(
            metrics={"forms": metrics(found), "dropped": len(found.dropped), "train_loss": trained["loss"]},
            tables={
                "plans": main,
                "plans_by_form": [row for form in found.forms() for row in found.summary(form=form)],
                "prompts": found.rows,
                "training": trained["history"],
            },
            figures={
                "plans": plans_figure(found, forms=[TRAINED, HELD_OUT], title=title),
                "training": curves_figure(trained["history"], title=f"form {TRAINED!r}, mean over facts"),
            },
            artifacts={"finetuned": run.folder("train") / "model"},
            question="Which weights, used at which token, retrieve a finetuned fact?",
            caveats=[
                f"Model: {scored['label']}.",
                f"{self.facts} invented facts, one training run, one seed: the intervals are over facts only.",
                "The facts were trained on; this measures how they are retrieved, not what the model generalises.",
                "The target is the first token of the second name. Top-5 flatters: read it beside the probability.",
                f"Grafts use the {self.head}'s unembedding and the {self.final_norm}'s final norm; SFT is the whole "
                "model.",
                f"Prompts dropped because the entity was not found: {len(found.dropped)}.",
            ],
        )

    def plans(self) -> dict[str, Any]:
        """The eight standard plans with this recipe's components and switches."""
        from lightning_interp import paper_plans

        return dict(paper_plans(components=self.components, head=self.head, final_norm=self.final_norm))

    def invented(self, run: RunFolder) -> list[Any]:
        """The facts that this run wrote."""
        from lightning_interp.grafting.facts import Fact

        lines = (run.folder("facts") / "facts.jsonl").read_text().splitlines()
        return [Fact(**json.loads(line)) for line in lines]


def compact(found: GraftResult, plan: str) -> Mapping[str, Any]:
    """One printed row: the trained prompt form, and the held-out one's accuracy."""
    return {
        "plan": plan,
        "top-5": str(found.estimate(plan, "top5", form=TRAINED)),
        "probability": str(found.estimate(plan, "target_prob", form=TRAINED)),
        "median rank": found.estimate(plan, "target_rank", form=TRAINED).value,
        "recovery": str(found.recovery(plan, form=TRAINED)),
        "held-out top-5": str(found.estimate(plan, "top5", form=HELD_OUT)),
        "facts": len(found.values(plan, "top5", TRAINED)),
    }


def metrics(found: GraftResult) -> dict[str, Any]:
    """Every estimate with its interval, by form, plan and metric."""
    from lightning_interp.grafting.metrics import METRICS

    return {
        form: {plan: {m: found.estimate(plan, m, form=form).to_dict() for m in METRICS} for plan in found.plans}
        for form in found.forms()
    }
