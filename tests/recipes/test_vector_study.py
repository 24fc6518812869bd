"""Sweeps of vectors: scores against one text at a time, cells by hand, and what is written."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_interp import ModelMap, Site
from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering import AddDirection, SteeringVector
from lightning_interp.testing import byte_tokenizer, tiny_model
from lightning_interp.testing.snapshot import snapshot
from lightning_interp_recipes.steering._contrasts import ContrastItem
from lightning_interp_recipes.steering._vectors import (
    Cell,
    ScoredText,
    TextProbe,
    cells,
    choose_cell,
    encode_items,
    layer_figure,
    preferences,
    score_sweep,
    spread_layers,
    sweep_figure,
    write_sweep,
)

TOKENIZER = byte_tokenizer()
ITEMS = [
    ContrastItem(" good day", " bad", "so"),
    ContrastItem("yes, indeed", "no"),
    ContrastItem(" up.", " down.", "it went"),
]
STRENGTHS = [-3.0, 0.0, 2.0]


def directions(*layers):
    return {f"resid_post.{layer}": torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in layers}


@pytest.fixture(scope="module")
def model_map():
    return ModelMap.build(tiny_model("llama"))


def slowly(model, text, vector, layer, strength):
    """Mean log-probability of one text's scored tokens, in one plain pass."""
    ids = torch.tensor([text.ids])
    steer = AddDirection(vector, site=Site("resid_post", layer), strength=strength)
    with steer.attach(model), torch.no_grad():
        told = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(told[t - 1, text.ids[t]]) for t in range(text.start, len(text.ids))) / (len(text.ids) - text.start)


def test_endings_begin_where_the_prompt_ends():
    texts = encode_items(TOKENIZER, ITEMS)
    assert [(len(text.ids), text.start) for text in texts] == [(11, 2), (6, 2), (11, 1), (2, 1), (11, 7), (13, 7)]
    assert TOKENIZER.decode(texts[0].ids) == "so good day"


def test_a_tokenizer_that_joins_prompt_and_ending():
    class Joining:
        """Two letters a token, so the last letter of the prompt may go with the ending."""

        def __call__(self, text):
            cut = [[ord(c) for c in t] for t in ([text] if isinstance(text, str) else text)]
            rows = [[sum(row[i : i + 2]) for i in range(0, len(row), 2)] for row in cut]
            return {"input_ids": rows[0] if isinstance(text, str) else rows}

    (one, other) = encode_items(Joining(), [ContrastItem("defg", "xyz", "abc")])
    assert (one.start, other.start) == (1, 1)  # "c" and "d" are one token, which is no longer the prompt's own


def test_an_ending_without_tokens_of_its_own():
    class Deaf:
        """Hears three letters."""

        def __call__(self, text):
            rows = [[1] * min(3, len(t)) for t in ([text] if isinstance(text, str) else text)]
            return {"input_ids": rows[0] if isinstance(text, str) else rows}

    with pytest.raises(DataError, match=r"'abcdef' has no token after its prompt 'abc'"):
        encode_items(Deaf(), [ContrastItem("def", "x", "abc")])


@pytest.mark.parametrize("budget", [5, 40, 4096])
def test_sweeps_are_texts_one_at_a_time(model_map, budget):
    vector, texts = SteeringVector(directions(1, 3)), encode_items(TOKENIZER, ITEMS)
    before, seen = snapshot(model_map.model), []
    found = score_sweep(
        model_map, vector, texts, layers=[1, 3], strengths=STRENGTHS, token_budget=budget, advance=seen.append
    )
    assert snapshot(model_map.model) == before
    assert seen == [1, 1]
    for i, layer in enumerate([1, 3]):
        for j, strength in enumerate(STRENGTHS):
            for k, text in enumerate(texts):
                expected = slowly(model_map.model, text, vector, layer, strength)
                assert float(found[i, j, k]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(found[0, 1], found[1, 1])  # strength 0 is no layer's doing


def test_cells_are_changes_against_strength_0(model_map):
    vector, texts = SteeringVector(directions(1)), encode_items(TOKENIZER, ITEMS)
    neutral = [ScoredText(tuple(TOKENIZER(text)["input_ids"]), 1) for text in ("one two", "three four")]
    ends, plain = (score_sweep(model_map, vector, part, layers=[1], strengths=STRENGTHS) for part in (texts, neutral))
    found = cells(ends, plain, [1], STRENGTHS)
    assert [(cell.layer, cell.strength) for cell in found] == [(1, s) for s in STRENGTHS]
    for j, cell in enumerate(found):
        by_item = [
            (ends[0, j, 2 * n] - ends[0, j, 2 * n + 1]) - (ends[0, 1, 2 * n] - ends[0, 1, 2 * n + 1]) for n in range(3)
        ]
        assert cell.effect.value == pytest.approx(float(sum(by_item)) / 3)
        assert cell.damage.value == pytest.approx(float((plain[0, 1] - plain[0, j]).mean()))
        assert (cell.effect.n, cell.damage.n) == (3, 2)
        assert cell.preferred == pytest.approx(float((preferences(ends)[0, j] > 0).double().mean()))
    assert (found[1].effect.value, found[1].damage.value) == (0.0, 0.0)
    assert found[0].row()["perplexity ratio"] == pytest.approx(math.exp(found[0].damage.value))


def cell(layer, strength, effect, damage):
    made = [Estimate(value, value - 0.1, value + 0.1, 9, 0.95, "bootstrap") for value in (effect, damage)]
    return Cell(layer, strength, *made, preferred=0.5)


def test_the_chosen_cell_is_the_best_that_costs_little():
    found = [cell(1, 0.0, 9.0, 0.0), cell(1, 4.0, 3.0, 0.9), cell(2, 1.0, 1.0, 0.1), cell(2, 2.0, 2.0, 0.2)]
    assert choose_cell(found, max_damage=0.2) is found[3]
    assert choose_cell(found, max_damage=0.15) is found[2]
    assert choose_cell(found, max_damage=1.0) is found[1]
    with pytest.raises(RecipeError, match=r"max_damage=0.05 .* least harm is 0.1, at layer 2 and strength 1"):
        choose_cell(found, max_damage=0.05)


def test_layers_are_spread_from_1_on():
    for layers in range(2, 90):
        for count in (1, 2, 8):
            found = spread_layers(layers, count)
            assert found[0] == 1
            assert found[-1] < layers
            assert len(found) <= count
    assert spread_layers(9, 8) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_probe_reads_means_of_texts(model_map):
    site = Site("resid_post", 2)
    probe = TextProbe.fit(model_map, TOKENIZER, ITEMS, site)

    def mean(text):
        with torch.no_grad():
            ids = torch.tensor([TOKENIZER(text)["input_ids"]])
            return model_map.model(ids, output_hidden_states=True).hidden_states[3][0].double().mean(0)

    plus, minus = (torch.stack([mean(item.texts[side]) for item in ITEMS]).mean(0) for side in (0, 1))
    gap = plus - minus
    expected = float((mean("a new text") - minus) @ gap / (gap @ gap))
    assert probe.read(model_map, TOKENIZER, ["a new text"])[0] == pytest.approx(expected, abs=1e-4)
    sides = [probe.read(model_map, TOKENIZER, [item.texts[side] for item in ITEMS]) for side in (0, 1)]
    assert [sum(side) / 3 for side in sides] == pytest.approx([1.0, 0.0], abs=1e-4)
    assert probe.accuracy(model_map, TOKENIZER, ITEMS) == sum(a > b for a, b in zip(*sides, strict=True)) / 3
    assert probe.read(model_map, TOKENIZER, ["", "ab"])[0] == pytest.approx(-probe.negative)


def test_a_probe_needs_a_difference(model_map):
    with pytest.raises(DataError, match=r"Both sides of the 1 items have the same mean at resid_post.1"):
        TextProbe.fit(model_map, TOKENIZER, [ContrastItem("same", "same")], Site("resid_post", 1))


def test_what_is_written_is_each_prompt_at_each_strength_alone(model_map):
    vector = SteeringVector(directions(2))
    rows = write_sweep(model_map, TOKENIZER, vector, ["one", "twenty"], layer=2, strengths=STRENGTHS, new_tokens=5)
    assert [(row["strength"], row["prompt"]) for row in rows] == [(s, p) for s in STRENGTHS for p in ("one", "twenty")]
    for row in rows:
        batch = TOKENIZER(row["prompt"], return_tensors="pt")
        with AddDirection(vector, strength=row["strength"]).attach(model_map):
            written = model_map.model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert row["text"] == TOKENIZER.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len({row["text"] for row in rows}) > 2


def test_figures_show_what_was_found(tmp_path):
    found = [cell(layer, s, 0.1 * layer * s, abs(s) / 10) for layer in (1, 5) for s in STRENGTHS]
    maps = sweep_figure(found, chosen=(5, 2.0), title="a model")
    left, right, *_ = maps.axes
    assert left.images[0].get_array().ravel().tolist() == pytest.approx([-0.3, 0.0, 0.2, -1.5, 0.0, 1.0])
    assert right.images[0].get_array().ravel().tolist() == pytest.approx([0.3, 0.001, 0.2] * 2)
    assert [t.get_text() for t in left.get_xticklabels()] == ["-3", "0", "2"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["1", "5"]
    assert left.patches[0].get_xy() == (1.5, 0.5)
    curve = layer_figure(found[:3], title="a model, layer 1")
    assert curve.axes[0].lines[0].get_ydata().tolist() == pytest.approx([-0.3, 0.0, 0.2])
    assert "9 held-out items" in curve.get_suptitle()
    for name, figure in (("maps", maps), ("curve", curve)):
        figure.savefig(tmp_path / f"{name}.png")
    assert layer_figure([Cell(1, 0.0, *[Estimate(0.0, math.nan, math.nan, 1, 0.95, "bootstrap")] * 2, 0.0)])
