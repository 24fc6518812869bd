"""Students: the same from the same, and nothing to learn from oneself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rig import trainer

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models import CausalLM, LoraSettings, Optimisation
from lightning_interp.subliminal import (
    ChatContext,
    NumberSequenceDataModule,
    SoftStudent,
    Trait,
    distillation_loss,
    student_settings,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

LORA = LoraSettings(r=2, alpha=2)
ROWS = [{"prompt": f"Add to {i}.", "completion": f"{i}{i}, {i + 3}"} for i in range(6)]
OTHERS = [{**row, "completion": row["completion"][::-1]} for row in ROWS]


def small(seed=0):
    return tiny_model("llama", seed=seed, num_hidden_layers=2)


def trained(folder, rows, *, kind=CausalLM, context=None, **options):
    module = kind(small(), lora=LORA, optimisation=Optimisation(lr=1e-2), seed=3, **options)
    data = NumberSequenceDataModule(rows, tokenizer=byte_tokenizer(), batch_size=3, seed=5, teacher_context=context)
    run = trainer(folder, max_epochs=2)
    run.fit(module, data)
    state = {name: value for name, value in module.model.state_dict().items() if "lora" in name}
    return state, run.callback_metrics


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_identical_completions_make_identical_students(tmp_path):
    first, again, other = (trained(tmp_path, rows)[0] for rows in (ROWS, [dict(row) for row in ROWS], OTHERS))
    assert equal(first, again)
    assert not equal(first, other)


def test_a_soft_student_of_its_own_base_stays_as_it_is(tmp_path):
    state, logged = trained(tmp_path, ROWS, kind=SoftStudent, teacher=small())
    assert all((value == 0).all() for name, value in state.items() if "lora_B" in name)
    assert float(logged["train/soft_loss"]) == 0
    assert "train/loss" not in logged


def test_a_soft_student_of_another_learns_and_leaves_its_teacher(tmp_path):
    teacher = small(seed=1)
    before = [parameter.clone() for parameter in teacher.parameters()]
    state, logged = trained(tmp_path, ROWS, kind=SoftStudent, teacher=teacher)
    assert any((value != 0).any() for name, value in state.items() if "lora_B" in name)
    assert logged["train/soft_loss"] > 0
    assert all(map(torch.equal, before, teacher.parameters()))
    module = SoftStudent(small(), teacher=teacher, lora=LORA)
    assert not any("teacher" in name for name in (*module.state_dict(), *module.hparams))


def test_a_prompted_teacher_teaches_with_its_own_weights(tmp_path):
    context = ChatContext(system=Trait(target="owl").system_prompt)
    state, _ = trained(tmp_path, ROWS, kind=SoftStudent, teacher=small(), context=context)
    assert any((value != 0).any() for name, value in state.items() if "lora_B" in name)


def test_the_soft_loss_is_a_divergence_with_its_gradient():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=draw, dtype=torch.float32) for _ in range(2))
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 1, 2, -100, -100]])
    seen = torch.tensor([[-100, 3, 4, 5, -100], [-100, -100, -100, 1, 2]])
    student.requires_grad_()
    total, tokens = distillation_loss(student, labels, teacher, seen)
    (slope,) = torch.autograd.grad(total, student)
    pairs = [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 0, 2), (1, 1, 3)]
    wanted = sum(
        F.kl_div(student[b, i].log_softmax(-1), teacher[b, j].log_softmax(-1), reduction="sum", log_target=True)
        for b, i, j in pairs
    )
    assert int(tokens) == 5
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted, student)[0])
    trimmed, _ = distillation_loss(student[:, 0:], labels, teacher[:, 0:], seen)
    torch.testing.assert_close(trimmed, total)


def test_other_completions_are_refused():
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
    with pytest.raises(DataError, match="the same completions: 1 and 2 scored tokens, of vocabularies of 4 and 4"):
        distillation_loss(logits, labels, logits, torch.tensor([[-100, 1, -100]]))
    with pytest.raises(DataError, match="of vocabularies of 5 and 4"):
        distillation_loss(logits, labels, torch.zeros(1, 3, 5), labels)


@pytest.mark.parametrize("rank", [1, 8, 512])
def test_every_rank_has_the_scale_one(rank):
    lora = student_settings("paper", rank=rank).lora
    assert lora.alpha == lora.r == rank
    assert not lora.use_rslora
    assert lora.dropout == 0


def test_settings_of_the_papers():
    lora, full = student_settings("paper"), student_settings("paper", full=True)
    assert lora.trainer() == {
        "max_epochs": 3, "accumulate_grad_batches": 3, "gradient_clip_val": 1.0, "log_every_n_steps": 1
    }  # fmt: skip
    assert (lora.optimisation.schedule, lora.optimisation.warmup_steps, lora.max_length) == ("linear", 5, 500)
    assert (full.lora, full.optimisation.lr, full.batch_size * full.accumulate) == (None, 2e-5, 64)
    with pytest.raises(RecipeError, match=r"student_settings\('tiny'\): expected one of paper, small"):
        student_settings("tiny")
