"""Caches under the name that the installed version has: read, handed on, and never asked for by a deprecated name."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging as hub_logging

from lightning_interp import AddDirection, Last, Site
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_in, cache_of, installed_versions
from lightning_interp.grafting import GraftEvaluator, GraftPlan, GraftPrompt
from lightning_interp.testing import FAMILIES, byte_tokenizer, tiny_model, tiny_pair

IDS = torch.arange(5, 13)[None]


@pytest.fixture
def complaints():
    """What transformers logs of deprecated names; each text comes once a process, so it is made to forget."""
    logger, found = hub_logging.get_logger("transformers"), []
    forget = getattr(type(logger).warning_once, "cache_clear", lambda: None)
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    forget()
    logger.addHandler(handler)
    yield lambda: [text for text in found if "deprecated" in text]
    logger.removeHandler(handler)
    forget()


def test_the_fixture_sees_a_complaint(complaints):
    hub_logging.get_logger("transformers.somewhere").warning_once("`old` is deprecated")
    assert complaints() == ["`old` is deprecated"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_deprecated_name_is_used(family, complaints):
    model = tiny_model(family)
    steer = AddDirection(torch.ones(model.config.hidden_size), site=Site("resid_post", 0))
    with steer.attach(model), torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        model(IDS[:, 5:], **cache_argument(model, cache_of(first)), use_cache=True)
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert complaints() == []


def test_the_evaluator_uses_no_deprecated_name(complaints):
    recipient, donor = tiny_pair("llama")
    text = "Ann lives in Rome, works in Oslo, sings in Bern, swims in Nice and "
    prompts = [GraftPrompt(text * 4, "Paris")]  # long enough for a prefix to be worth a pass
    plans = {"LT": GraftPlan.at(Last(), "BLOCK"), "LT ATTN": GraftPlan.at(Last(), "ATTN")}  # one prefix, cached
    scores = GraftEvaluator(prompts, byte_tokenizer(), plans=plans)
    scores.evaluate(recipient, donor)
    assert scores.tokens["fed"] > 0
    assert complaints() == []


def test_where_an_output_has_its_cache():
    cache = DynamicCache()
    for name in ("cache", "past_key_values"):
        assert cache_of(SimpleNamespace(**{name: cache})) is cache
    assert cache_of(SimpleNamespace(logits=1)) is None
    assert cache_of(tiny_model("llama")(IDS, use_cache=False)) is None


def test_what_is_a_cache_among_arguments():
    cache = DynamicCache()
    assert cache_in((None, 3, cache), {"mask": None}) is cache
    assert cache_in((IDS,), {"attention_mask": IDS}) is None


def test_versions_for_messages():
    assert f"torch {torch.__version__.partition('+')[0]}" in installed_versions()
