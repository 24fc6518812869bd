"""A reward model on the bundled language model: real template, real lengths."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.models import RewardModel
from lightning_interp.testing import needs

TEXTS = [
    "Paris.",
    "I think that it is Paris, but let me explain at some length why people might doubt it. " * 3,
    "",
]


@pytest.fixture(scope="module")
def module():
    return RewardModel("smollm2-135m-instruct", max_length=64)


@needs(bundled=True)
def test_scores_do_not_depend_on_the_batch_or_on_padding(module):
    prompts = ["What is the capital of France?"] * len(TEXTS)
    together, truncated = module.scores(prompts, TEXTS)
    encoded = module.encoder.encode_texts(prompts, TEXTS)
    assert truncated.tolist() == [False, True, False]
    module.eval()
    for row, text in enumerate(encoded):
        with torch.no_grad():
            alone = module(torch.tensor([text.ids]))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)
    padding, ids = [module.encoder.pad_id] * 5, encoded[-1].ids
    with torch.no_grad():
        left = module(torch.tensor([padding + ids]), torch.tensor([[0] * 5 + [1] * len(ids)]))
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)
    assert float(together.std()) > 0.01


@needs(bundled=True)
def test_texts_are_written_as_the_template_tokenises_them(module):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    (text,) = module.encoder.encode_texts(["Hi"], ["Hello there"])
    expected = module.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert text.ids == list(expected)
    assert text.ids.count(module.tokenizer.bos_token_id) == 3  # its begin token opens each turn, and none is doubled
