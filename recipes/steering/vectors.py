"""Make a steering vector from contrasting texts: which layer and strength move a behaviour, and at what cost?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class SteeringVectors(Recipe):
    """Extract a vector for one behaviour, sweep layers and strengths, and read what the steered model writes.

    Half of the contrast items make the vector, a quarter chooses layer and strength, the rest reports. The effect is
    how much likelier (nats a token, against strength 0) a held-out positive ending becomes than its negative one; the
    cost is what neutral text loses. All strengths of a layer are rows of the same forward passes.
    """

    behaviour: str = "mood"
    """A set of ours (mood, formal, past), or a JSONL file with positive and negative (and prompt) in each line."""
    method: Literal["mean_difference", "pca", "pca_centred", "logistic"] = "mean_difference"
    """How the direction is made from the activations of both sides."""
    read: Literal["all", "last"] = "all"
    """Tokens of a text that are read: the mean over all, or the last one."""
    layers: list[int] = field(default_factory=list)
    """Layers that are tried one at a time, from 1 on; by default eight, evenly spread."""
    strengths: list[float] = field(default_factory=lambda: [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
    """1 carries the mean of the negative texts to that of the positive ones."""
    max_damage: float = 0.2
    """Nats a token that neutral text may lose at the chosen strength."""
    new_tokens: int = 24
    """Tokens that are written after each opening, at every strength of the chosen layer."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.new_tokens, self.max_damage, self.strengths = min(self.new_tokens, 6), 1e9, [-2.0, 2.0]
        self.strengths = sorted({*map(float, self.strengths), 0.0})
        if len(self.strengths) < 2 or self.new_tokens < 1 or self.max_damage <= 0:
            raise RecipeError(
                f"strengths={self.strengths}, new_tokens={self.new_tokens}, max_damage={self.max_damage}: expected a "
                "strength besides 0, at least 1 token, and a cost above 0."
            )

    def study(self, run: RunFolder) -> RecipeResult:
        """Extract, sweep, write, report."""
        made = run.phase("extract", lambda folder: self.extract(run, folder))
        swept = run.phase("sweep", lambda folder: self.sweep(run, folder, made))
        written = run.phase("write", lambda folder: self.write(run, folder, swept))
        return self.result(run, made, swept, written)

    def extract(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Make the vector at every layer, and save it."""
        from lightning_interp import All, Last, ModelMap, Site, load_causal_lm
        from lightning_interp.steering import extract_vector

        from ._vectors import spread_layers

        loaded = load_causal_lm(self.source)
        train = self.split().train
        positive, negative = zip(*(item.texts for item in train), strict=True)
        model_map = ModelMap.build(loaded.model)
        with run.progress("reading texts", total=2 * len(train)) as bar:
            vector = extract_vector(
                model_map, loaded.tokenizer, positive, negative, method=self.method, concept=self.concept,
                site=[Site("resid_post", layer) for layer in range(1, len(model_map))],
                positions=All() if self.read == "all" else Last(), advance=bar.advance,
            )  # fmt: skip
        vector.save(folder / "vector.safetensors")
        vector.save(folder / "vector.gguf")
        layers = self.layers or spread_layers(len(model_map), 2 if self.smoke else 8)
        return {"vector": vector.describe(), "layers": layers, "label": loaded.label}

    def sweep(self, run: RunFolder, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
        """Score held-out endings and neutral texts at every layer and strength."""
        import torch

        from lightning_interp import ModelMap, load_causal_lm
        from lightning_interp.running.results import write_scalars
        from lightning_interp.steering.vectors.directions import encode_texts

        from ._contrasts import NEUTRAL
        from ._vectors import ScoredText, encode_items, score_sweep

        loaded, parts = load_causal_lm(self.source), self.split()
        neutral = NEUTRAL[:2] if self.smoke else NEUTRAL
        texts = {
            "choose": encode_items(loaded.tokenizer, parts.choose),
            "report": encode_items(loaded.tokenizer, parts.report),
            "neutral": [ScoredText(tuple(ids), 1) for ids in encode_texts(loaded.tokenizer, neutral)],
        }
        flat, vector = [text for part in texts.values() for text in part], self.vector(run)
        with run.progress("sweeping layers", total=len(made["layers"])) as bar:
            scores = score_sweep(
                ModelMap.build(loaded.model), vector, flat, layers=made["layers"], strengths=self.strengths,
                advance=bar.advance,
            )  # fmt: skip
        found = dict(zip(texts, torch.split(scores, [len(part) for part in texts.values()], dim=-1), strict=True))
        for i, layer in enumerate(made["layers"]):
            curve = (found["report"][i, :, 0::2] - found["report"][i, :, 1::2]).mean(-1).tolist()
            write_scalars(run.path / "tensorboard" / "sweep", f"steering/preference/layer_{layer}", curve)
        return {name: part.tolist() for name, part in found.items()} | {"layers": made["layers"]}

    def write(self, run: RunFolder, folder: Path, swept: dict[str, Any]) -> dict[str, Any]:
        """Let the model write at every strength of the chosen layer, and read that with the unsteered model."""
        from lightning_interp import ModelMap, Site, load_causal_lm
        from lightning_interp.generation.text_quality import repeated_share

        from ._contrasts import OPENINGS
        from ._vectors import TextProbe, write_sweep

        loaded, parts = load_causal_lm(self.source), self.split()
        model_map, layer = ModelMap.build(loaded.model), self.chosen(swept).layer
        probe = TextProbe.fit(model_map, loaded.tokenizer, parts.train, Site("resid_post", layer))
        rows = write_sweep(
            model_map, loaded.tokenizer, self.vector(run), OPENINGS, layer=layer, strengths=self.strengths,
            new_tokens=self.new_tokens,
        )  # fmt: skip
        values = probe.read(model_map, loaded.tokenizer, [row["text"] for row in rows])
        for row, value in zip(rows, values, strict=True):
            row |= {"probe": value, "repeated": repeated_share(row["text"].split(), n=2) if row["text"] else None}
        return {"rows": rows, "accuracy": probe.accuracy(model_map, loaded.tokenizer, parts.report)}

    def result(
        self, run: RunFolder, made: dict[str, Any], swept: dict[str, Any], written: dict[str, Any]
    ) -> RecipeResult:
        """Cells on the reporting part, chosen on the other; two figures; every text."""
        from lightning_interp.core.measure.statistics import mean_interval

        from ._vectors import layer_figure, sweep_figure

        chosen, report = self.chosen(swept), self.cells(swept, "report")
        here = [cell for cell in report if cell.layer == chosen.layer]
        best = next(cell for cell in here if cell.strength == chosen.strength)
        title = f"{made['label']}: {self.concept}, {self.method}"
        writing = [
            {
                "strength": strength,
                "probe value of what is written": str(mean_interval([row["probe"] for row in rows])),
                "repeated word pairs": str(mean_interval([r["repeated"] or 0.0 for r in rows])),
                "texts": len(rows),
            }
            for strength in self.strengths
            if (rows := [row for row in written["rows"] if row["strength"] == strength])
        ]
        folder, parts = run.folder("extract"), self.split()
        return RecipeResult(
            metrics={
                "chosen": {"layer": best.layer, "strength": best.strength, "effect": best.effect.to_dict(),
                           "damage": best.damage.to_dict(), "positive_preferred": best.preferred},
                "unsteered_positive_preferred": next(cell.preferred for cell in here if cell.strength == 0),
                "probe_accuracy_held_out": written["accuracy"],
                "vector": made["vector"],
            },
            tables={
                "chosen_layer": [cell.row() for cell in here],
                "sweep": [cell.row() for cell in report],
                "writing": writing,
                "texts": written["rows"],
            },
            figures={
                "sweep": sweep_figure(report, chosen=(best.layer, best.strength), title=title),
                "chosen_layer": layer_figure(here, title=f"{title}, layer {best.layer}"),
            },
            artifacts={"vector": folder / "vector.safetensors", "control_vector": folder / "vector.gguf"},
            question=f"At which layer and strength does a vector for {self.concept!r} act, and at what cost?",
            findings=found_at(best),
            captions={
                "sweep": "A cell is a layer (upwards) at a strength (across), on the reporting part; left the effect, "
                "right the cost. See where the effect is strong while the cost is small; the frame is what was chosen.",
                "chosen_layer": "Effect and cost at the chosen layer against the strength, with 95 % intervals: a good "
                "vector rises evenly through zero, and costs little between its ends.",
            },
            terms=self.terms(parts.report[0]),
            caveats=self.about(made['label'], parts, best, written['accuracy']),
            summary="chosen_layer",
        )  # fmt: skip

    def terms(self, shown: Any) -> dict[str, str]:
        """What the names mean, with an item as an example."""
        return {
            "item": f"a beginning with two endings that differ in {self.concept!r}, such as {shown.prompt!r:.80}: "
            f"{shown.positive.strip()!r:.80} (positive) and {shown.negative.strip()!r:.80} (negative)",
            "strength": "how much of the vector is added: 1 carries the mean of the negative texts to that of the "
            "positive ones, 0 is not steered",
            "effect": "how much likelier (nats a token, against strength 0) the positive ending of an item becomes "
            "than its negative one",
            "neutral text loses": "how much less likely (nats a token) ordinary text becomes",
            "positive preferred": "share of items whose positive ending is the likelier one",
            "probe value": "where written text lies between both kinds of texts, read with the unsteered model",
            "[a, b]": "95 % interval over held-out items, or neutral texts",
        }

    def about(self, model: str, parts: Any, best: Any, accuracy: float) -> list[str]:
        """What the numbers rest on."""
        from lightning_interp.core.measure.statistics import counted

        most = f"with a cost of at most {self.max_damage:g} nats a token" if self.max_damage < 100 else "at any cost"
        return [
            f"One model, {model}, and one vector ({self.method.replace('_', ' ')}, {self.read} tokens "
            f"read, {counted(len(parts.train), 'item')}): others may differ.",
            f"Layer and strength were chosen on {counted(len(parts.choose), 'item')} (largest effect {most}) and "
            f"are reported on {len(parts.report)} others.",
            "Intervals are over held-out items and neutral texts: one division of one set, one vector.",
            f"The cost is measured on {best.damage.n} neutral texts and belongs to the same texts in both parts.",
            "Endings differ in more than the behaviour, such as length and word frequency; only the change against "
            "strength 0 is due to steering.",
            "The probe reads written texts with the unsteered model at the steered layer, and was made from the "
            f"same texts as the vector; it ranks {accuracy:.0%} of the held-out pairs right.",
        ]

    @property
    def concept(self) -> str:
        """Name of the behaviour."""
        return Path(self.behaviour).stem

    def split(self) -> Any:
        """The three parts of the items, the same in every phase."""
        from ._contrasts import read_contrasts, split_contrasts

        items = read_contrasts(self.behaviour)
        return split_contrasts(items[:12] if self.smoke else items, seed=self.seed)

    def vector(self, run: RunFolder) -> Any:
        """The vector that this run made."""
        from lightning_interp.steering import SteeringVector

        return SteeringVector.load(run.folder("extract") / "vector.safetensors")

    def cells(self, swept: dict[str, Any], part: str) -> list[Any]:
        """Effect and cost of every layer and strength on one part."""
        import torch

        from ._vectors import cells

        endings, neutral = (torch.tensor(swept[name], dtype=torch.float64) for name in (part, "neutral"))
        return cells(endings, neutral, swept["layers"], self.strengths)

    def chosen(self, swept: dict[str, Any]) -> Any:
        """The cell that the choosing part prefers."""
        from ._vectors import choose_cell

        return choose_cell(self.cells(swept, "choose"), max_damage=self.max_damage)


def found_at(best: Any) -> list[str]:
    """What the chosen layer and strength do, in words that the intervals allow."""
    from lightning_interp.core.measure.statistics import counted

    from ._common import moved

    return [
        f"At layer {best.layer} and strength {best.strength:g}, which were chosen on other items, positive "
        f"endings {moved(best.effect, 'gain', 'lose', 'are not shown to move')} against their negative ones: "
        f"{best.effect} nats a token, over {counted(best.effect.n, 'item')}.",
        f"Neutral text {moved(best.damage, 'gets less likely', 'gets likelier', 'is not shown to move')}: a "
        f"loss of {best.damage} nats a token, over {counted(best.damage.n, 'text')}.",
    ]
