"""What a pass knows about its tokens, against a slow loop over columns and against what generate really calls."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.pass_arguments import step_reader
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError
from lightning_interp.testing import FAMILIES, tiny_model


class Probe(Intervention):
    """Keeps what each pass says about its tokens."""

    def __init__(self):
        self.steps = []

    def sites(self, model_map):
        return (Site("resid_post", 0),)

    def transform(self, site, x, step):
        assert x.shape[:2] == step.positions.shape
        self.steps.append(step)
        return x


@st.composite
def passes(draw):
    """A mask of prompt and generated tokens, with how much of it is in the cache."""
    batch, total = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=total, max_size=total), min_size=batch, max_size=batch))
    past = draw(st.integers(0, total - 1))
    return mask, past


@given(passes())
def test_tokens_of_a_pass_against_a_loop(drawn):
    mask, past = drawn
    batch, total = len(mask), len(mask[0])
    step = StepContext(batch, total - past, past, attention_mask=torch.tensor(mask).long())
    for row in range(batch):
        index = -1
        for column in range(total):
            index += mask[row][column]
            if column >= past:
                expected = index if mask[row][column] else -1
                assert int(step.positions[row, column - past]) == expected
                assert bool(step.valid[row, column - past]) is mask[row][column]
        assert int(step.lengths[row]) == sum(mask[row])
    assert step.columns.tolist() == list(range(past, total))
    assert step.is_prefill is (past == 0 or total - past > 1)


@given(passes(), st.data())
def test_some_rows_are_the_rows_of_all(drawn, data):
    mask, past = drawn
    batch, total = len(mask), len(mask[0])
    ids = torch.arange(batch * (total - past)).view(batch, total - past)
    whole = StepContext(
        batch, total - past, past, input_ids=ids, attention_mask=torch.tensor(mask), batch={"m": ids, "n": 3}
    )
    index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
    part = whole.rows(index)
    for name in ("positions", "valid", "lengths", "input_ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[index])
    assert torch.equal(part.batch["m"], ids[index])
    assert part.batch["n"] == 3
    assert sorted(part.batch) == ["m", "n"]
    assert [part.row_number(i) for i in range(len(index))] == index
    assert [part.rows([0]).row_number(0)] == index[:1]


def test_without_a_mask_every_token_is_real():
    step = StepContext(2, 3, past=4)
    assert step.positions.tolist() == [[4, 5, 6]] * 2
    assert step.valid.all()
    assert step.lengths.tolist() == [7, 7]


def test_a_longer_mask_belongs_to_tokens_that_come_later():
    step = StepContext(1, 2, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert step.positions.tolist() == [[-1, 0]]


PROMPT = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 2])
def test_every_pass_of_generate(family, beams):
    model = tiny_model(family)
    probe = Probe()
    with probe.attach(model):
        out = model.generate(
            PROMPT, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False
        )
    assert out.shape == (2, 9)
    prompt, *decoding = probe.steps
    expected = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]).repeat_interleave(prompt.batch_size // 2, 0)
    assert torch.equal(prompt.positions, expected)
    assert prompt.is_prefill
    assert prompt.past == 0
    assert len(decoding) == 3
    for i, step in enumerate(decoding):
        assert step.positions.tolist() == [[3 + i]] * beams + [[5 + i]] * beams
        assert step.lengths.tolist() == [4 + i] * beams + [6 + i] * beams
        assert step.columns.tolist() == [5 + i]
        assert (step.past, step.length, step.is_prefill) == (5 + i, 1, False)
        assert step.valid.all()
        if beams == 1:
            assert torch.equal(step.input_ids, out[:, 5 + i : 6 + i])


def test_generate_without_a_cache():
    probe, model = Probe(), tiny_model("llama")
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": False}
    with probe.attach(model):
        model.generate(PROMPT, attention_mask=MASK, **settings)
    assert [(step.past, step.length) for step in probe.steps] == [(0, 5), (0, 6), (0, 7)]
    assert probe.steps[2].positions.tolist() == [[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


def test_right_padding_and_a_cache():
    model, probe = tiny_model("llama"), Probe()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with probe.attach(model), torch.no_grad():
        out = model(PROMPT[:, :3], attention_mask=mask, use_cache=True)
        longer = torch.cat([mask, torch.ones(2, 2).long()], 1)
        model(PROMPT[:, 3:], attention_mask=longer, **cache_argument(model, cache_of(out)))
    assert probe.steps[0].positions.tolist() == [[0, 1, -1], [0, 1, 2]]
    assert probe.steps[1].positions.tolist() == [[2, 3], [3, 4]]
    assert probe.steps[1].is_prefill  # a chunk of a prompt


def test_a_window_that_slides_is_still_counted():
    model, probe = tiny_model("gemma2"), Probe()  # a window of 8
    ids = torch.arange(5, 25)[None]
    with probe.attach(model):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [step.positions[0, -1].item() for step in probe.steps] == [19, 20, 21]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_arguments_are_found_however_they_are_passed(family):
    model = tiny_model(family)
    backbone = ModelMap.build(model).backbone
    read, embeds = step_reader(backbone), torch.zeros(2, 5, 32)
    by_name = read((), {"input_ids": PROMPT, "attention_mask": MASK})
    order = list(inspect.signature(backbone.forward).parameters)
    values = {"input_ids": PROMPT, "attention_mask": MASK}
    by_place = read(tuple(values.get(name) for name in order[: order.index("attention_mask") + 1]), {})
    for step in (by_name, by_place):
        assert torch.equal(step.input_ids, PROMPT)
        assert step.positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    embedded = read((), {"inputs_embeds": embeds})
    assert embedded.input_ids is None
    assert (embedded.batch_size, embedded.length) == (2, 5)


def test_embeddings_instead_of_ids():
    model, probe = tiny_model("gpt2"), Probe()
    with probe.attach(model), torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(PROMPT), attention_mask=MASK)
    assert probe.steps[0].positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert probe.steps[0].input_ids is None


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (torch.ones(2, 1, 5, 5), r"\(2, 1, 5, 5\); expected \[2, 5\]"),
        (torch.ones(2, 4), r"\(2, 4\); expected \[2, 5\] \(cache of 0 \+ 5 tokens\)"),
        (torch.ones(3, 5), r"\(3, 5\); expected \[2, 5\]"),
    ],
)
def test_masks_that_tell_no_positions(mask, shape):
    model = tiny_model("llama")
    with Probe().attach(model), pytest.raises(PositionError, match=f"attention_mask of shape {shape}"):
        model(PROMPT, attention_mask=mask)


def test_a_cache_that_prepares_its_own_masks():
    model = tiny_model("llama")
    with Probe().attach(model), pytest.raises(PositionError, match="LlamaModel was given a dict of attention masks"):
        model(PROMPT, attention_mask={"full_attention": MASK})


def test_a_static_cache_is_refused():
    settings = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static"}
    model = tiny_model("llama")
    with Probe().attach(model), pytest.raises(PositionError, match=r"shape \(2, 1, 5, \d+\).*a dynamic cache"):
        model.generate(PROMPT, attention_mask=MASK, **settings)


def test_calls_without_tokens():
    read = step_reader(ModelMap.build(tiny_model("llama")).backbone)
    with pytest.raises(
        PositionError, match=r"LlamaModel was called without input_ids or inputs_embeds of shape \[B, T\]"
    ):
        read((), {"attention_mask": MASK})
    with pytest.raises(PositionError, match="LlamaModel was called without input_ids"):
        read((torch.arange(3),), {})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_rows_are_refused(family):
    model, ids = tiny_model(family), torch.arange(12).view(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    says = r"several texts in one row \({}: packed, or continuous batching\).* Use a padded batch"
    with Probe().attach(model):
        with pytest.raises(PositionError, match=says.format("position_ids that begin anew")):
            model(ids, position_ids=positions, use_cache=False)
        model(ids, position_ids=positions[1:].expand(2, -1), use_cache=False)
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)  # read as one text
        lengths = torch.tensor([0, 3, 6], dtype=torch.int32)
        with pytest.raises(PositionError, match=says.format("cu_seq_lens_q")):
            model(ids, cu_seq_lens_q=lengths, use_cache=False)


def test_rows_of_a_mask_of_another_size():
    step = StepContext(2, 3, batch={"m": torch.ones(5, 3)})
    with pytest.raises(PositionError, match=r"Mask 'm' is \(5, 3\); expected a tensor \[B, T\] with B=2"):
        _ = step.rows([0]).batch["m"]


class Renamed:
    """A cache that somebody passes under another name, or by place."""

    def get_seq_length(self):
        return 4


@pytest.mark.parametrize("how", ["cache", "past_key_values", "kv", "by place"])
def test_a_cache_is_known_by_what_it_is(how):
    class Decoder(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, anything=None, **more):
            return input_ids

    ids, cache = torch.zeros(2, 1, dtype=torch.long), Renamed()
    read = step_reader(Decoder())
    step = read((ids, None, cache), {}) if how == "by place" else read((ids,), {how: cache})
    assert (step.past, step.is_prefill, step.positions.tolist()) == (4, False, [[4], [4]])


def test_a_pass_that_cannot_be_placed_is_refused():
    model, probe = tiny_model("llama"), Probe()
    with (
        probe.attach(model),
        pytest.raises(PositionError, match=r"1 tokens and an attention_mask of 3.*transformers \d.*use_cache=False"),
    ):
        model(PROMPT[:, :1], attention_mask=torch.ones(2, 3).long())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_one_pass_over_its_text(family):
    """Positions, validity and the prompt's length of every decoding step, whatever the cache argument is called."""
    model, probe = tiny_model(family), Probe()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with probe.attach(model):
        model.generate(PROMPT, attention_mask=MASK, **settings)
    assert [(step.past, step.length) for step in probe.steps] == [(0, 5), (5, 1), (6, 1), (7, 1)]
    found = torch.cat([step.positions for step in probe.steps], dim=1)
    expected = torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], 1).cumsum(1) - 1
    real = found >= 0
    assert torch.equal(found[real], expected[real])
    assert [step.prompt_lengths.tolist() for step in probe.steps] == 4 * [MASK.sum(1).tolist()]
