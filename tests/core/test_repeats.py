"""Values that are given one a prompt serve its beams and samples, and no rows of other prompts."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.core.tokens.positions import Last, Span
from lightning_interp.core.tokens.repeats import rows_each
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.row_weights import RowWeights
from lightning_interp.errors import PositionError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.steering.activation.intervention import AddDirection
from lightning_interp.steering.softmax.dual_intervention import DualSteering
from lightning_interp.testing import tiny_pair

FOUR = torch.tensor([[5, 9, 14], [5, 9, 14], [7, 50, 3], [7, 50, 4]])
PLANS = [GraftPlan.at(Last()), GraftPlan.at(Span(0, 2))]


def step(ids, **more):
    return StepContext(*ids.shape, input_ids=ids, **more)


@pytest.mark.parametrize("make", [
    lambda donor: Graft(donor, PLANS),
    lambda donor: RowWeights({"a": donor}, torch.tensor([0, 1])),
    lambda donor: AddDirection(torch.ones(32), site="resid_post.1", strength=[0.0, 1.0]),
    lambda donor: DualSteering(torch.ones(32), t=torch.tensor([0.0, 1.0]), alpha=0.5, support=None),
])  # fmt: skip
def test_two_values_for_four_prompts_are_refused(make):
    recipient, donor = tiny_pair("llama")
    with make(donor).attach(recipient), torch.no_grad():
        with pytest.raises(PositionError, match="2 for a pass of 4 rows, which are not 2 prompts with the same"):
            recipient(FOUR)
        two = recipient(FOUR[[0, 2]]).logits
        torch.testing.assert_close(recipient(FOUR[[0, 0, 2, 2]]).logits[::2], two, atol=1e-5, rtol=1e-5)
        for many in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            recipient.generate(FOUR[[0, 2]], max_new_tokens=3, **many)


def test_rows_of_a_prompt():
    assert rows_each(step(FOUR), 4, "Values") == 1
    assert rows_each(step(FOUR), 1, "Values") == 4
    assert rows_each(step(FOUR[[0, 1, 0, 1]]), 2, "Values") == 2
    padded = StepContext(2, 3, input_ids=FOUR[[0, 0]], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    with pytest.raises(PositionError, match="Values: 3 for a pass of 2 rows"):
        rows_each(padded, 3, "Values")


def test_decoding_steps_go_by_their_prompt():
    prompt, one = step(FOUR[[0, 1, 2, 2]]), torch.tensor([[1], [2], [3], [4]])
    assert rows_each(step(one, past=3, prompt=prompt), 2, "Values") == 2
    with pytest.raises(PositionError, match="Values: 2 for a pass of 4 rows"):
        rows_each(step(one, past=3, prompt=step(FOUR)), 2, "Values")
    with pytest.raises(PositionError, match="Values: 2 for a pass of 4 rows"):
        rows_each(step(one, past=3, prompt=step(FOUR[:2])), 2, "Values")


def test_answers_of_a_prompt_may_differ_where_its_length_is_known():
    lengths = torch.tensor([2, 2, 2, 2])
    assert rows_each(step(FOUR, known_prompt_lengths=lengths), 2, "Values") == 2
    with pytest.raises(PositionError, match="Values: 2"):
        rows_each(step(FOUR, known_prompt_lengths=lengths + 1), 2, "Values")


def test_embeddings_tell_no_prompts_apart():
    with pytest.raises(PositionError, match="Give one for each row"):
        rows_each(StepContext(4, 3), 2, "Values")
