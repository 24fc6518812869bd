"""What is a finetuned fact fetched with: maps over layers and components."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

FORM = "statement"
COMPONENTS = ("ATTN", "O", "FFN_UP", "FFN_DOWN")


@dataclass(kw_only=True)
class GraftComponents(Recipe):
    """Finetune a language model on invented facts, then map which layers and components carry them at which token.

    One map grafts one component of a window of layers at the last token, with the first entity's tokens grafted in full
    and without; the other grafts a whole window of layers at the entity and at the last token. Hundreds of plans share
    the prompt before the last token, so the maps cost little more than their last tokens.
    """

    facts: int = 16
    """Number of invented pairs; the unit of every interval."""
    rank: int = 16
    """Rank of the adapter, on every linear map; alpha is twice the rank."""
    epochs: int = 6
    """Passes over the texts."""
    batch_size: int = 8
    """Texts a step."""
    lr: float = 1e-3
    """Learning rate."""
    watch_every: int = 3
    """Epochs between graft scores during training."""
    window: int = 5
    """Layers grafted together in the maps; a single one often moves too little to see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoke:
            self.facts, self.epochs, self.watch_every, self.window = min(self.facts, 4), min(self.epochs, 2), 1, 1

    def study(self, run: RunFolder) -> RecipeResult:
        """Invent facts, train, map, report."""
        run.phase("facts", self.write_facts)
        trained = run.phase("train", lambda folder: self.train(run, folder), every_rank=True)
        scored = run.phase("maps", lambda folder: self.maps(run, folder))
        return self.result(run, trained, scored)

    def write_facts(self, folder: Path) -> dict[str, Any]:
        """Write the facts and the training texts."""
        from ._common import write_facts

        return write_facts(folder, self.facts, seed=self.seed)

    def train(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Finetune an adapter, with graft scores on the way."""
        from lightning_interp import GraftCallback, LoraSettings, Optimisation

        from ._common import asked, finetune

        watch = GraftCallback(asked(run, [FORM]), every_n_epochs=self.watch_every)
        told = finetune(
            self,
            run,
            folder,
            run.folder("facts") / "train.jsonl",
            epochs=self.epochs,
            optimisation=Optimisation(lr=self.lr, schedule="linear"),
            batch_size=self.batch_size,
            lora=LoraSettings(r=self.rank, alpha=2 * self.rank),
            callbacks=[watch],
        )
        return {"history": watch.history, **told}

    def maps(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Score every cell of every map."""
        from lightning_interp import GraftEvaluator, ModelMap, load_causal_lm
        from lightning_interp.grafting import component_plans

        from ._common import asked, evaluate

        tuned = load_causal_lm(str(run.folder("train") / "model"))
        layers = len(ModelMap.build(tuned.model))
        plans = {name: plan for grid in self.grids(layers).values() for name, plan in grid.plans.items()}
        evaluator = GraftEvaluator(asked(run, [FORM]), tuned.tokenizer, plans=plans | component_plans() | self.ends())
        found = evaluate(run, evaluator, tuned.model, "default", "mapping")
        label = load_causal_lm(self.source).label
        return {"result": asdict(found), "layers": layers, "tokens": evaluator.tokens, "label": label}

    def result(self, run: RunFolder, trained: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
        """The component sets as the main table, every map as a figure and as a table."""
        from lightning_interp.grafting import GraftResult, component_plans

        from ._common import compact, dropped_rows, metrics_of
        from ._explained import GRID_CAPTION, TRAINING_CAPTION, best_of, dropped_note, findings, terms
        from ._figures import curves_figure, grid_figure

        found = GraftResult(**scored["result"])
        grids = self.grids(scored["layers"])
        width = min(self.window, scored["layers"])
        title = f"{scored['label']}, {self.facts} invented facts"
        return RecipeResult(
            metrics={"forms": metrics_of(found), "tokens": scored["tokens"], "train_loss": trained["loss"]},
            tables={
                "sets": [compact(found, plan) for plan in ("PRE", "SFT", *self.ends(), *component_plans())],
                **{
                    name: [
                        {"layers": row, "column": column, **compact(found, grid.cells[row, column])}
                        for row in grid.rows
                        for column in grid.columns
                    ]
                    for name, grid in grids.items()
                },
                "prompts": found.rows,
                "dropped": dropped_rows(found),
                "training": trained["history"],
            },
            figures={
                **{name: grid_figure(found, grid, title=title) for name, grid in grids.items()},
                "training": curves_figure(trained["history"], title=f"form {FORM!r}, mean over facts"),
            },
            artifacts={"finetuned": run.folder("train") / "model"},
            question="Which layers and components carry a finetuned fact, at the entity and at the last token?",
            findings=[*findings(found), best_of(found, component_plans(), "sets of components at the last token")],
            captions={**dict.fromkeys(grids, GRID_CAPTION), "training": TRAINING_CAPTION},
            terms=terms(["PRE", "SFT", *self.ends(), *component_plans(), "(FE+LT)^C"]),
            caveats=[
                f"One model, {scored['label']}: another may differ.",
                f"{self.facts} invented facts, one training run, one seed: the intervals are over facts only.",
                f"The maps have {sum(len(grid.plans) for grid in grids.values())} cells: some look special by chance.",
                "A cell is one layer." if width == 1 else f"Cells are windows of {width} layers, which overlap.",
                "A cell that brings the fact back is sufficient there; one that does not may still be necessary.",
                *dropped_note(found),
            ],
        )

    def grids(self, layers: int) -> dict[str, Any]:
        """The three maps of a model with so many layers."""
        from lightning_interp import FromBatch, GraftPlan
        from lightning_interp.grafting import component_grid, layer_grid

        width = min(self.window, layers)
        entity = GraftPlan.at(FromBatch("FE"))
        return {
            "components": component_grid(layers, components=COMPONENTS, width=width),
            "components_with_entity": component_grid(
                layers, components=COMPONENTS, width=width, base=entity, label="FE+LT"
            ),
            "layers": layer_grid(layers, width=width),
        }

    def ends(self) -> dict[str, Any]:
        """The whole routes, to compare with."""
        from lightning_interp import paper_plans

        return {name: paper_plans()[name] for name in ("FE", "LT", "FE+LT")}
