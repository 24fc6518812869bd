from __future__ import annotations

import math

import lightning as L
import pytest
import torch

from lightning_interp.errors import RecipeError
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule
from lightning_interp.models.training.optimisation import Optimisation, adamw, plain, schedule_of, settings_of
from lightning_interp.testing import byte_tokenizer


def rates(schedule, warmup, total, steps, **more):
    settings = Optimisation(**{"lr": 2.0, "schedule": schedule, "warmup_steps": warmup, **more})
    optimizer = adamw([torch.nn.Parameter(torch.zeros(2, 2))], settings)
    scheduler = schedule_of(optimizer, settings, total_steps=total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return seen


def test_learning_rates():
    assert rates("constant", 0, math.inf, 3) == [2, 2, 2]
    assert rates("constant", 4, math.inf, 6) == [0, 0.5, 1, 1.5, 2, 2]
    assert rates("linear", 2, 6, 7) == [0, 1, 2, 1.5, 1, 0.5, 0]
    assert rates("linear", 0, 4, 5) == [2, 1.5, 1, 0.5, 0]
    assert rates("cosine", 0, 4, 5) == pytest.approx([1 + math.cos(math.pi * step / 4) for step in range(5)])


def test_a_run_without_end_has_no_schedule_that_falls():
    with pytest.raises(RecipeError, match=r"schedule='cosine' falls by the last step, but this run has none"):
        rates("cosine", 0, math.inf, 1)


def test_warm_up_is_a_share_of_all_steps():
    seen = rates("constant", 0, 40, 40, lr=1.5e-4, warmup_fraction=0.05)
    assert seen[:3] == [0, 7.5e-5, 1.5e-4]
    assert seen[39] == 1.5e-4
    assert rates("constant", 0, 8, 1, lr=1.5e-4, warmup_fraction=0.05) == [1.5e-4]
    assert rates("linear", 0, 6, 7, warmup_fraction=1 / 3) == rates("linear", 2, 6, 7)


def test_a_rate_falls_to_its_floor():
    seen = rates("cosine", 0, 40, 41, lr=1.5e-4, warmup_fraction=0.05, min_lr_fraction=0.1)
    assert seen[:3] == [0, 7.5e-5, 1.5e-4]
    assert [seen[20], seen[21], seen[39]] == pytest.approx([8.80741e-5, 8.25e-5, 1.52305e-5], rel=1e-5)
    assert seen[40] == pytest.approx(1.5e-5)
    assert rates("linear", 1, 5, 7, min_lr_fraction=0.5) == [0, 2, 1.75, 1.5, 1.25, 1, 1]
    assert rates("linear", 2, 2, 3, min_lr_fraction=0.5) == [0, 1, 1]


def test_a_cosine_without_floor_falls_to_zero():
    seen = rates("cosine", 0, 128, 128, lr=1e-5)
    assert [seen[0], seen[64], seen[127]] == pytest.approx([1e-5, 5e-6, 1.506e-9], rel=1e-3)


def test_a_run_without_end_has_no_share_of_its_steps():
    with pytest.raises(RecipeError, match=r"warmup_fraction=0.1 is a share of all steps, .* choose warmup_steps"):
        rates("constant", 0, math.inf, 1, warmup_fraction=0.1)


def test_a_module_counts_the_steps_of_its_run(tmp_path):
    settings = Optimisation(lr=1e-3, warmup_fraction=0.5, eps=1e-6)
    module = CausalLM("tiny:llama", lora=LoraSettings(r=1), optimisation=settings)
    data = TextDataModule([{"text": "ab"}] * 4, tokenizer=byte_tokenizer(), batch_size=1)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert [scheduler.lr_lambdas[0](step) for step in range(4)] == [0, 0.5, 1, 1]
    assert trainer.optimizers[0].param_groups[0]["eps"] == 1e-6


def test_what_an_earlier_version_saved_is_read_and_written():
    before = plain(Optimisation(lr=3e-3, warmup_steps=2))
    assert before.keys() == {"lr", "weight_decay", "betas", "warmup_steps", "schedule", "gradient_checkpointing"}
    later = {"eps": 1e-6, "min_lr_fraction": 0.1}
    now = plain(Optimisation(lr=3e-3, warmup_steps=2, schedule="cosine", **later))
    assert now == before | later | {"schedule": "cosine"}
    default, given = Optimisation(lr=1e-4), Optimisation(lr=5.0)
    assert settings_of(default, default, dict(before)) == Optimisation(lr=3e-3, warmup_steps=2)
    assert settings_of(default, default, dict(now)).eps == 1e-6
    assert settings_of(default, given, dict(before)) is given is settings_of(default, given, dict(now))
    with pytest.raises(RecipeError, match="eps is given beside Optimisation settings"):
        settings_of(default, given, {"eps": 1e-6})


def test_matrices_decay_and_vectors_do_not():
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    settings = Optimisation(lr=1.0, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-5)
    groups = adamw([matrix, frozen, vector], settings).param_groups
    assert [
        (len(g["params"]), g["params"][0] is p, g["weight_decay"])
        for g, p in zip(groups, (matrix, vector), strict=True)
    ] == [
        (1, True, 0.3),
        (1, True, 0.0),
    ]
    assert (groups[0]["betas"], groups[0]["eps"]) == ((0.5, 0.6), 1e-5)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"lr": 0.0}, "lr=0.0: expected a number above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\)"),
        ({"eps": -1e-8}, "eps=-1e-08: expected a number of at least 0"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction=1.0: expected a share of all steps"),
        ({"warmup_fraction": -0.1}, r"warmup_fraction=-0.1"),
        ({"warmup_fraction": 0.1, "warmup_steps": 3}, r"warmup_fraction=0.1: expected .* 0 beside warmup_steps=3"),
        ({"min_lr_fraction": 0.1}, r"min_lr_fraction=0.1: expected .* \(schedule='constant'\)"),
        ({"min_lr_fraction": 1.5, "schedule": "linear"}, r"min_lr_fraction=1.5"),
        ({"warmup_steps": -1}, "warmup_steps=-1: expected at least 0"),
        ({"schedule": "step"}, "schedule='step': expected one of constant, linear, cosine"),
    ],
)
def test_wrong_settings_are_refused(setting, match):
    with pytest.raises(RecipeError, match=match):
        Optimisation(**{"lr": 1e-3} | setting)
