"""Solves are exact whatever the process has set for its own products, and leave it as it was."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.steering.softmax.arithmetic import entropy, exact_arithmetic, working_dtype

BACKENDS = (torch.backends.cuda, torch.backends.mkldnn)
CPU = torch.device("cpu")


def precisions():
    return [backend.matmul.fp32_precision for backend in BACKENDS]


@pytest.fixture(autouse=True)
def as_before():
    before = precisions()
    yield
    for backend, value in zip(BACKENDS, before, strict=True):
        backend.matmul.fp32_precision = value


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_are_not_rounded_inside_and_the_setting_comes_back(setting):
    torch.set_float32_matmul_precision(setting)
    before = precisions()
    with exact_arithmetic(CPU):
        assert set(precisions()) <= {"none", "ieee"}
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == setting


def test_the_setting_comes_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    before = precisions()
    with pytest.raises(ZeroDivisionError), exact_arithmetic(CPU):
        1 / 0  # noqa: B018
    assert precisions() == before


def test_one_backend_with_a_setting_of_its_own():
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with exact_arithmetic(CPU):
        assert precisions()[1] == "ieee"
    assert precisions()[1] == "bf16"


def test_autocast_is_off_inside_and_on_again():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_arithmetic(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_work_is_done_in_float32_at_least():
    half, double = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)
    assert working_dtype(half, None) == torch.float32
    assert working_dtype(half, double) == torch.float64


def test_entropy_passes_over_what_never_comes_and_keeps_nan():
    rows = torch.tensor([[0.5, 0.5, 0.0], [torch.nan, 0.5, 0.5]]).log()
    assert entropy(rows).isnan().tolist() == [False, True]
    assert entropy(rows)[0].item() == pytest.approx(0.6931471805599453)
