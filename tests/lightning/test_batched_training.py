"""Adapters that are trained together are those that are trained alone."""

from __future__ import annotations

import pytest

from lightning_interp.errors import RecipeError
from lightning_interp.lora import AdapterCell, train_adapters_together
from lightning_interp.models import LoraSettings, Optimisation
from lightning_interp.testing import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 4) for b in range(5, 9)]


def cell(key="a", **options):
    plain = {"data": ROWS, "optimisation": Optimisation(lr=1e-2), "max_steps": 2, "lora": LoraSettings(r=2)}
    return AdapterCell(key=key, **{**plain, **options})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"key": "a/b"}, "cannot use key='a/b': expected the name of a folder"),
        ({"max_steps": None}, "cannot use max_steps=None: expected max_steps or max_epochs"),
        ({"max_epochs": 0}, "cannot use max_epochs=0: expected .* of at least 1"),
        ({"clip": 0.0}, "cannot use clip=0.0: expected a number above 0"),
        ({"lora": LoraSettings(use_dora=True)}, "expected use_dora=False"),
    ],
)
def test_a_cell_that_cannot_be_trained_is_refused(wrong, says):
    with pytest.raises(RecipeError, match=says):
        cell(**wrong)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="got no cells"):
        train_adapters_together(tiny_model(), byte_tokenizer(), [], tmp_path)
