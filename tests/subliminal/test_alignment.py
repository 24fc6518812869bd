"""Alignment of a student's shift: planted directions, the null of permuted rows, and streamed sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.measure.statistics import t_interval
from lightning_interp.core.measure.streamed import StreamedSums, reduced_sum
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import All, Last, Span
from lightning_interp.errors import DataError, IncompatibleModelError, PositionError, RecipeError
from lightning_interp.subliminal import ChatContext, Trait
from lightning_interp.subliminal.alignment import align, hidden_states, over_seeds, state_sums
from lightning_interp.subliminal.distilled import distilled_vectors
from lightning_interp.subliminal.figures import alignment_figure
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
QUESTIONS = ["Which animal?", "Name your favourite animal, please.", "What do you like?", "So?", "And why is that?"]
BARE = ChatContext(chat=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=3)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plant(Intervention):
    """Adds a vector at a layer: a student whose shift is known."""

    def __init__(self, layer, vector):
        self.layer, self.vector = layer, vector

    def sites(self, model_map):
        return [Site("resid_post", self.layer)]

    def transform(self, site, x, step):
        return x + self.vector


class TestStates:
    @pytest.mark.parametrize("context", [BARE, ChatContext(system="Be kind.", answer_prefix="It is")])
    def test_are_those_of_transformers(self, model, context):
        found = hidden_states(model, TOKENIZER, QUESTIONS, context=context, layers=[0, 1], token_budget=100)
        for question, states in zip(QUESTIONS, found, strict=True):
            ids = torch.tensor([context.ids(TOKENIZER, question)])
            with torch.no_grad():
                expected = model(ids, output_hidden_states=True).hidden_states
            torch.testing.assert_close(
                states, torch.stack([expected[1][0, -1], expected[2][0, -1]]), atol=2e-5, rtol=1e-4
            )

    def test_positions(self, model):
        whole = hidden_states(model, TOKENIZER, ["abc"], context=BARE, positions=All())
        parts = [hidden_states(model, TOKENIZER, ["abc"[:n]], context=BARE, positions=Last()) for n in (1, 2, 3)]
        torch.testing.assert_close(whole, torch.stack(parts).mean(0), atol=1e-5, rtol=1e-4)

    def test_streamed_sums_are_those_of_all_rows_at_once(self, model):
        states = hidden_states(model, TOKENIZER, QUESTIONS, context=BARE).double()
        small = state_sums(model, TOKENIZER, QUESTIONS, context=BARE, token_budget=20)
        parts = [state_sums(model, TOKENIZER, part, context=BARE) for part in (QUESTIONS[:2], QUESTIONS[2:])]
        for found in (small, parts[0] + parts[1]):
            assert found.count == 5
            torch.testing.assert_close(found.mean, states.mean(0), atol=1e-5, rtol=1e-4)

    def test_sums_of_processes_add_up(self, monkeypatch):
        """What each of two processes gathers; real processes do it in the tests of probes."""
        both = [StreamedSums.of(rows(4, 2, 3)), None, StreamedSums.of(rows(2, 2, 3, seed=1))]
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)

        def gather(out, part, group):
            out[:] = both

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        found = reduced_sum(both[0])
        torch.testing.assert_close(found.mean, torch.cat([rows(4, 2, 3), rows(2, 2, 3, seed=1)]).mean(0))
        both[:] = [None] * 3
        assert reduced_sum(None) is None


class TestPlanted:
    def test_a_planted_vector_is_found_where_it_was_planted(self, model):
        vector = rows(32).float()
        before = hidden_states(model, TOKENIZER, QUESTIONS)
        with Plant(1, 0.5 * vector).attach(model):
            after = hidden_states(model, TOKENIZER, QUESTIONS)
        found = align((after - before)[:, 1:2], vector[None], layers=[1], draws=200)
        assert found.cosine[0].value == pytest.approx(1, abs=1e-5)
        assert found.projection[0].value == pytest.approx(0.5, abs=1e-5)
        assert torch.equal(after[:, 0], before[:, 0])

    def test_the_direction_of_a_trait_is_that_of_its_teacher(self, model):
        """A student that answers as if it had the trait's system text has cosine 1 and projection 1 at each layer."""
        trait = ChatContext(system=Trait(target="wolf").system_prompt)
        with_trait, without = (state_sums(model, TOKENIZER, QUESTIONS, context=c) for c in (trait, ChatContext()))
        shift = hidden_states(model, TOKENIZER, QUESTIONS, context=trait) - hidden_states(model, TOKENIZER, QUESTIONS)
        found = align(shift, with_trait.mean - without.mean, draws=100)
        assert [round(cosine.value, 5) for cosine in found.cosine] == [1, 1, 1]
        assert found.mean_projection.value == pytest.approx(1, abs=1e-4)

    def test_against_means_and_loops(self):
        shift, direction, other = rows(7, 3, 5), rows(3, 5, seed=1), rows(3, 5, seed=2)
        found = align(shift, direction, others={"lion": other}, draws=50)
        for layer in range(3):
            mean, u = shift[:, layer].mean(0), direction[layer]
            cosine = float(nn.functional.cosine_similarity(mean, u, dim=0))
            assert found.cosine[layer].value == pytest.approx(cosine)
            assert found.projection[layer].value == pytest.approx(float(mean @ u / (u @ u)))
            expected = nn.functional.cosine_similarity(mean, other[layer], dim=0)
            assert found.others["lion"][layer] == pytest.approx(float(expected))
            assert found.cosine[layer].low <= cosine <= found.cosine[layer].high
        assert found.mean_cosine.value == pytest.approx(np.mean([c.value for c in found.cosine]))

    def test_the_bootstrap_and_flips_are_of_whole_rows(self):
        """Of two opposite rows along the direction: every flip and every resample is -1, 0 or 1."""
        u = rows(1, 4)
        shift = torch.stack([u, -u, u])
        found = align(shift, u, draws=300)
        assert set(np.round(found.null, 9).ravel().tolist()) == {-1.0, 1.0}
        assert found.null.mean() == pytest.approx(0, abs=0.2)
        still = align(torch.zeros(3, 1, 4), u)
        assert [still.cosine[0].value, still.projection[0].value, *still.null.ravel()[:3]] == [0] * 5


class TestNull:
    @pytest.mark.parametrize("permute", ["shift", "direction"])
    def test_covers_what_has_no_direction(self, permute):
        """Rows without a mean of their own: the band holds 95 % of cosines, and the p values are even."""
        inside, p = [], []
        for seed in range(80):
            shift, direction = rows(16, 2, 10, seed=2 * seed), rows(12, 2, 10, seed=2 * seed + 1)
            if permute == "shift":
                direction = direction.mean(0)
            found = align(shift, direction, permute=permute, draws=150, seed=seed)
            low, high = found.band()
            cosines = np.array([c.value for c in found.cosine])
            inside += ((low <= cosines) & (cosines <= high)).tolist()
            p += found.p_values().tolist()
            assert abs(found.null.mean()) < 0.12
        assert 0.90 <= np.mean(inside) <= 0.99
        assert 0.42 < np.mean(p) < 0.58

    @pytest.mark.parametrize("permute", ["shift", "direction"])
    def test_finds_what_has_one(self, permute):
        u = 2 * rows(2, 10, seed=5)
        shift, direction = u + rows(16, 2, 10), u + rows(12, 2, 10, seed=1)
        found = align(shift, direction, permute=permute, draws=400)
        assert found.p_values().max() < 0.01
        assert found.mean_cosine.value > found.mean_band()[1]


class TestSeeds:
    def test_the_mean_over_seeds(self):
        u = rows(2, 6)
        each = [
            align(u + rows(5, 2, 6, seed=s), u, seed=s, draws=40, others={"x": rows(2, 6, seed=9)}) for s in (1, 2, 3)
        ]
        found = over_seeds(each, name="trait")
        expected = t_interval([one.cosine[1].value for one in each])
        assert (found.cosine[1], found.units, found.name) == (expected, "seeds", "trait")
        np.testing.assert_allclose(found.null, (each[0].null + each[1].null + each[2].null) / 3)
        row = found.table()[1]
        assert (row["layer"], row["cosine"], row["seeds"]) == (1, str(expected), 3)
        assert row["cosine with x"] == pytest.approx(np.mean([one.others["x"][1] for one in each]), abs=1e-3)
        assert alignment_figure([found, each[0]], title="t").axes[0].get_legend_handles_labels()[1] == [
            "permuted rows", "trait", "student",
        ]  # fmt: skip

    def test_a_vector_has_no_interval(self):
        found = align(rows(2, 6), rows(2, 6), draws=10)
        assert str(found.cosine[0]) == "1.00"


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(60, 70, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    mask = torch.ones_like(ids)
    mask[0, 6:], labels[0, 6:] = 0, -100
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels}] * 4


class TestDistilled:
    def test_each_layer_learns_as_if_it_were_alone(self, model, batches):
        together = distilled_vectors(model, batches, layers=[0, 2], lr=0.05)
        for i, layer in enumerate((0, 2)):
            alone = distilled_vectors(model, batches, layers=[layer], lr=0.05)
            torch.testing.assert_close(alone.vectors[0], together.vectors[i], atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(alone.losses[:, 0], together.losses[:, i])

    def test_against_a_hook_and_adam(self, model, batches):
        batch, v = batches[0], torch.zeros(32, requires_grad=True)
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[2]
        unit = states[batch["attention_mask"] == 1].norm(dim=-1).median() / 32**0.5
        optimizer = torch.optim.Adam([v], lr=0.05)
        real = batch["attention_mask"][..., None]
        handle = model.model.layers[1].register_forward_hook(lambda m, i, o: o + real * unit * v)
        for _ in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        handle.remove()
        model.zero_grad()
        found = distilled_vectors(model, batches, layers=[1], lr=0.05)
        torch.testing.assert_close(found.vectors[0], (unit * v).detach(), atol=1e-5, rtol=1e-3)

    def test_leaves_the_model(self, model, batches):
        before = {name: x.clone() for name, x in model.state_dict().items()}
        found = distilled_vectors(model.train(), batches, layers=[1])
        assert found.losses.shape == (4, 1)
        assert model.training
        model.eval()
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_errors(self, model, batches):
        with pytest.raises(RecipeError, match=r"layers=\[\], lr=0.01"):
            distilled_vectors(model, batches, layers=[])
        with pytest.raises(RecipeError, match=r"lr=0\): expected"):
            distilled_vectors(model, batches, layers=[0], lr=0)
        with pytest.raises(DataError, match="got no batches"):
            distilled_vectors(model, [], layers=[0])
        nothing = {**batches[0], "labels": torch.full((4, 9), -100)}
        with pytest.raises(DataError, match="4 rows scores no token"):
            distilled_vectors(model, [nothing], layers=[0])


class TestErrors:
    def test_questions(self, model):
        for wrong in ([], "Why?"):
            with pytest.raises(DataError, match=r"hidden_states got questions="):
                hidden_states(model, TOKENIZER, wrong)
        with pytest.raises(DataError, match=r"Question 1 \(''\) has no tokens"):
            hidden_states(model, TOKENIZER, ["a", ""], context=BARE)
        with pytest.raises(PositionError, match=r"chooses no token of text 1: 'abc'"):
            hidden_states(model, TOKENIZER, ["a" * 9, "abc"], context=BARE, positions=Span(5, 6, strict=False))

    @pytest.mark.parametrize(
        ("shift", "direction", "how", "error", "match"),
        [
            ((4, 2, 3), (2, 4), {}, IncompatibleModelError, r"shape \[4, 2, 3\] and direction of \[2, 4\]"),
            ((4, 2, 3), (2, 3), {"others": {"x": rows(3, 3)}}, IncompatibleModelError, r"others\['x'\] of \[3, 3\]"),
            ((4, 2, 3), (2, 3), {"layers": [1]}, IncompatibleModelError, "1 numbers for 2 layers"),
            (
                (4, 2, 3),
                (2, 3),
                {"permute": "direction"},
                RecipeError,
                r"permute='direction', draws=1000\) with .*\[2, 3\]",
            ),
            ((4, 2, 3), (2, 3), {"permute": "rows"}, RecipeError, "permute='rows'"),
            ((4, 2, 3), (2, 3), {"draws": 0}, RecipeError, "draws=0"),
        ],
    )
    def test_align(self, shift, direction, how, error, match):
        with pytest.raises(error, match=match):
            align(rows(*shift), rows(*direction), **how)

    def test_values(self):
        with pytest.raises(DataError, match="not finite"):
            align(rows(4, 2, 3) / 0, rows(2, 3))
        with pytest.raises(DataError, match="zero at layer 1"):
            align(rows(4, 2, 3), rows(2, 3) * torch.tensor([[1.0], [0.0]]))

    def test_seeds(self):
        one, other = align(rows(2, 6), rows(2, 6), draws=10), align(rows(3, 6), rows(3, 6), draws=10)
        for wrong in ([], [one, other]):
            with pytest.raises(DataError, match=rf"got {len(wrong)} results of different layers"):
                over_seeds(wrong)
