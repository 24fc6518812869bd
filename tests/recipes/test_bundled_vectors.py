"""On a real language model a vector does what it is named after, in both directions."""

from __future__ import annotations

import pytest

from lightning_interp import All, ModelMap, Site, load_causal_lm
from lightning_interp.steering import extract_vector
from lightning_interp.testing import needs
from lightning_interp_recipes.steering._contrasts import read_contrasts, split_contrasts
from lightning_interp_recipes.steering._vectors import encode_items, preferences, score_sweep

STRENGTHS = [-2.0, 0.0, 2.0]
LAYER = 9


@pytest.fixture(scope="module")
def loaded():
    return load_causal_lm("smollm2-135m-instruct")


def made(loaded, behaviour):
    parts = split_contrasts(read_contrasts(behaviour), seed=0)
    positive, negative = zip(*(item.texts for item in parts.train[:8]), strict=True)
    site = Site("resid_post", LAYER)
    return parts, extract_vector(loaded.model, loaded.tokenizer, positive, negative, site=site, positions=All())


@needs(bundled=True)
@pytest.mark.parametrize("behaviour", ["mood", pytest.param("past", marks=pytest.mark.slow)])
def test_held_out_endings_become_likelier_with_the_strength(loaded, behaviour):
    parts, vector = made(loaded, behaviour)
    texts = encode_items(loaded.tokenizer, parts.report[:2])
    scores = score_sweep(ModelMap.build(loaded.model), vector, texts, layers=[LAYER], strengths=STRENGTHS)
    down, plain, up = preferences(scores)[0].mean(-1).tolist()
    assert down < plain - 0.05
    assert up > plain + 0.05
