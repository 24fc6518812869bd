"""Does the published pattern appear in a language model that is small enough to train from nothing?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class ReproduceTiny(Recipe):
    """Train a GPT-2 of about a million parameters on some facts, finetune it on new ones, and graft it token by token.

    Nothing is downloaded: names, texts, tokenizer and weights are made here. The model first reads facts about some
    people in both orders, and that the others exist; then it learns facts about these others. The table sets the eight
    standard plans beside the published pattern, each claim as an inequality between measured values.
    """

    model: str = "from scratch"
    """Only 'from scratch' (or a tiny model in a smoke run, which is not trained further than a step or two)."""
    facts_old: int = 45
    """Facts known before."""
    facts_new: int = 30
    """Facts learned by finetuning; the unit of every interval."""
    old_texts: int = 300
    """Old texts that are read again while finetuning, against forgetting."""
    layers: int = 4
    """Blocks."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads."""
    vocab_size: int = 1500
    """Tokens of the BPE tokenizer at most."""
    epochs: int = 20
    """Passes over the old texts from nothing."""
    lr: float = 2e-3
    """Their learning rate."""
    finetune_epochs: int = 12
    """Passes of finetuning."""
    finetune_lr: float = 1e-3
    """Its learning rate."""
    batch_size: int = 16
    """Texts a step."""
    watch_every: int = 3
    """Epochs between graft scores while finetuning."""
    head: Literal["recipient", "donor", "follow"] = "recipient"
    """Whose unembedding makes the logits of a graft."""
    final_norm: Literal["recipient", "donor", "follow"] = "recipient"
    """The same for the norm before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model != "from scratch" and not self.smoke:
            from lightning_interp.errors import RecipeError

            raise RecipeError(
                f"grafting/reproduce_tiny trains its own model, and cannot start from model={self.model!r}. Leave the "
                "setting out; grafting/facts and grafting/pair take a model."
            )
        if self.smoke:
            self.facts_old, self.facts_new, self.old_texts = 3, 3, 6
            self.layers, self.width, self.epochs, self.finetune_epochs, self.watch_every = 2, 32, 1, 2, 1

    def study(self, run: RunFolder) -> RecipeResult:
        """Make the world, train, finetune, graft, compare with the pattern."""
        run.phase("world", self.make_world)
        before = run.phase("pretrain", lambda folder: self.pretrain(run, folder), every_rank=True)
        after = run.phase("finetune", lambda folder: self.finetune(run, folder), every_rank=True)
        scored = run.phase("graft", lambda folder: self.graft(run, folder))
        return self.result(run, {**after, "loss_before": before["loss"]}, scored)

    def make_world(self, folder: Path) -> dict[str, Any]:
        """Write facts, texts, tokenizer and the untrained model."""
        import torch

        from . import _reproduce_tiny as world
        from ._common import write_jsonl

        old = world.world_facts(self.facts_old, seed=self.seed)
        new = world.world_facts(self.facts_new, seed=self.seed, skip=self.facts_old)
        known, learned = world.world_texts(old), world.world_texts(new)
        generator = torch.Generator().manual_seed(self.seed)
        again = [known[i] for i in torch.randperm(len(known), generator=generator)[: self.old_texts].tolist()]
        rows: dict[str, list[Any]] = {
            "facts_new": new,
            "before": known + world.introductions([*old, *new]),
            "finetune": learned + again,
        }
        tokenizer = world.train_tokenizer([row["text"] for row in rows["before"] + learned], vocab_size=self.vocab_size)
        world.fresh_model(
            folder / "untrained", tokenizer, layers=self.layers, width=self.width, heads=self.heads, seed=self.seed
        )
        return write_jsonl(folder, rows) | {"vocabulary": len(tokenizer)}

    def pretrain(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """From nothing to the old facts."""
        source = run.folder("world") / "untrained"
        return self.fit(run, folder, source, "before", self.epochs, self.lr, [])

    def finetune(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """From the old facts to the new ones, scoring grafts on the way."""
        from lightning_interp import GraftCallback

        watch = GraftCallback(self.prompts(run), plans=self.plans(), every_n_epochs=self.watch_every)
        source = run.folder("pretrain") / "model"
        told = self.fit(run, folder, source, "finetune", self.finetune_epochs, self.finetune_lr, [watch])
        return {**told, "history": watch.history}

    def fit(
        self, run: RunFolder, folder: Path, source: Path, texts: str, epochs: int, lr: float, callbacks: list[Any]
    ) -> dict[str, Any]:
        """Train all weights on one file of texts; goes on at the last checkpoint."""
        from lightning_interp import Optimisation

        from ._common import finetune

        return finetune(
            self,
            run,
            folder,
            run.folder("world") / f"{texts}.jsonl",
            source=str(source),
            epochs=epochs,
            optimisation=Optimisation(lr=lr, schedule="linear", weight_decay=0.01, warmup_steps=20),
            batch_size=self.batch_size,
            callbacks=callbacks,
            add_eos=True,
        )

    def graft(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Score every plan on every new fact."""
        from lightning_interp import GraftEvaluator, load_causal_lm

        from ._common import evaluate

        recipient = load_causal_lm(str(run.folder("pretrain") / "model"))
        donor = load_causal_lm(str(run.folder("finetune") / "model"))
        evaluator = GraftEvaluator(self.prompts(run), recipient.tokenizer, plans=self.plans())
        found = evaluate(run, evaluator, recipient.model, donor.model)
        return {"result": asdict(found), "parameters": sum(p.numel() for p in recipient.model.parameters())}

    def result(self, run: RunFolder, trained: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
        """The plans with intervals over facts, and each claim of the pattern."""
        from lightning_interp.grafting import GraftResult

        from ._common import compact, dropped_rows
        from ._explained import PLANS_CAPTION, TRAINING_CAPTION, dropped_note, findings, terms
        from ._figures import curves_figure, plans_figure
        from ._reproduce_tiny import pattern, pattern_finding

        found = GraftResult(**scored["result"])
        claims = pattern({plan: found.estimate(plan, "top5").value for plan in found.plans})
        title = f"GPT-2 with {scored['parameters'] / 1e6:.2f} M parameters, trained from nothing"
        return RecipeResult(
            metrics={
                "plans": {p: {m: found.estimate(p, m).to_dict() for m in SHOWN} for p in found.plans},
                "pattern": {row["claim"]: row["holds"] for row in claims},
                "loss_before": trained["loss_before"],
                "loss_finetuned": trained["loss"],
                "dropped": len(found.dropped),
            },
            tables={
                "plans": [compact(found, plan) for plan in found.plans],
                "dropped": dropped_rows(found),
                "pattern": claims,
                "plans_in_full": found.summary(),
                "prompts": found.rows,
                "training": trained["history"],
            },
            figures={
                "plans": plans_figure(found, title=title),
                "training": curves_figure(trained["history"], title="mean over the new facts, while finetuning"),
            },
            artifacts={"recipient": run.folder("pretrain") / "model", "donor": run.folder("finetune") / "model"},
            question="Does the published pattern of weight grafting appear in a model trained from nothing?",
            findings=[pattern_finding(claims, len(found.values("PRE", "top5"))), *findings(found)],
            captions={"plans": PLANS_CAPTION, "training": TRAINING_CAPTION},
            terms=terms(
                found.plans, **{"KL to donor": "divergence of a plan's next-token distribution from SFT's, in nats"}
            ),
            caveats=[
                f"{title}; {self.facts_new} new facts, one training run, one seed: intervals are over facts only.",
                "The claims compare point estimates; an interval may reach over a bound.",
                f"Grafts use the {self.head}'s unembedding and the {self.final_norm}'s final norm, and never the "
                "position embeddings; SFT is the whole model, so FE+LT may answer with less certainty than it.",
                "The prompt's wording is among the training texts: this measures how memorised facts are retrieved.",
                *dropped_note(found),
            ],
        )

    @property
    def used_model(self) -> str:
        """None: the model is trained from nothing."""
        return ""

    def plans(self) -> dict[str, Any]:
        """The eight standard plans with this recipe's switches."""
        from lightning_interp import paper_plans

        return dict(paper_plans(head=self.head, final_norm=self.final_norm))

    def prompts(self, run: RunFolder) -> list[Any]:
        """One prompt a new fact, in a trained wording."""
        from ._common import read_facts
        from ._reproduce_tiny import world_prompts

        return world_prompts(read_facts(run.folder("world") / "facts_new.jsonl"))


SHOWN = ("top1", "top5", "target_prob", "target_rank", "kl_to_donor")
