from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_interp.errors import RecipeError
from lightning_interp.models import DPOSettings, dpo_terms
from lightning_interp.models.training.head_loss import labelled_logps

LN2 = math.log(2)
# log pi(y_w), log ref(y_w), log pi(y_l), log ref(y_l), beta, difference of log-ratios, loss, dL/d log pi(y_w)
CLOSED = [
    (-10, -12, -11, -10, 0.1, 3, 0.554355244, -0.042555748),
    (-10, -12, -11, -10, 0.01, 3, 0.678259676, -0.004925006),
    (-3, -3, -5, -5, 0.1, 0, 0.693147181, -0.05),
    (-4, -2, -1, -6, 0.5, -7, 3.529750418, -0.485343885),
]


@pytest.mark.parametrize(("chosen", "ref_chosen", "rejected", "ref_rejected", "beta", "gap", "loss", "slope"), CLOSED)
def test_closed_forms(chosen, ref_chosen, rejected, ref_rejected, beta, gap, loss, slope):
    logps = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([ref_chosen, ref_rejected], dtype=torch.float64, requires_grad=True)
    terms = dpo_terms(logps, reference, DPOSettings(beta=beta))
    terms["loss"].mean().backward()
    assert float(terms["margin"]) == pytest.approx(beta * gap, abs=1e-12)
    assert float(terms["loss"].detach()) == pytest.approx(loss, abs=1e-9)
    assert logps.grad.tolist() == pytest.approx([slope, -slope], abs=1e-9)
    assert reference.grad is None
    assert float(terms["accuracy"]) == (gap > 0)
    assert float(terms["chosen_reward"]) == pytest.approx(beta * (chosen - ref_chosen))
    assert float(terms["rejected_reward"]) == pytest.approx(beta * (rejected - ref_rejected))


def test_swapped_sides_flip_the_margin():
    logps, reference = torch.tensor([-10.0, -4.0, -11.0, -1.0]), torch.tensor([-12.0, -2.0, -10.0, -6.0])
    terms = dpo_terms(logps, reference)
    swapped = dpo_terms(logps.roll(2), reference.roll(2))
    assert terms["margin"].tolist() == pytest.approx([0.3, -0.7])
    torch.testing.assert_close(swapped["margin"], -terms["margin"])
    torch.testing.assert_close(swapped["accuracy"], 1 - terms["accuracy"])


def test_smoothing_is_the_mean_over_right_and_wrong_labels():
    logps, reference = torch.tensor([-10.0, -11.0]), torch.tensor([-12.0, -10.0])
    right = float(dpo_terms(logps, reference)["loss"])
    wrong = float(dpo_terms(logps.flip(0), reference.flip(0))["loss"])
    found = float(dpo_terms(logps, reference, DPOSettings(label_smoothing=0.2))["loss"])
    assert found == pytest.approx(0.8 * right + 0.2 * wrong)
    same = dpo_terms(logps * 0, reference * 0, DPOSettings(label_smoothing=0.2))
    assert float(same["loss"]) == pytest.approx(LN2)


def test_ipo_pulls_the_gap_to_half_an_inverse_beta():
    logps = torch.tensor([3.0, -2.0], requires_grad=True)
    terms = dpo_terms(logps, torch.zeros(2), DPOSettings(beta=0.1, loss="ipo"))
    terms["loss"].sum().backward()
    assert float(terms["loss"].detach()) == pytest.approx(0)
    assert logps.grad.tolist() == pytest.approx([0, 0], abs=1e-6)
    start = dpo_terms(torch.zeros(2), torch.zeros(2), DPOSettings(beta=0.25, loss="ipo"))
    assert float(start["loss"]) == pytest.approx(4.0)


def test_on_toy_logits_the_ratio_grows_and_the_gradient_dies():
    """One token, two words, free logits, uniform reference."""
    theta = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    eye, sides = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
    reference = torch.full((2,), -LN2, dtype=torch.float64)
    settings, ratios, norms = DPOSettings(beta=1.0), [], []
    for _ in range(1600):
        logps = (theta @ eye).log_softmax(-1)[0, sides]
        terms = dpo_terms(logps, reference, settings)
        (gradient,) = torch.autograd.grad(terms["loss"].mean(), theta)
        ratios.append(float((logps[0] - logps[1]).detach()))
        norms.append(float(gradient.norm()))
        with torch.no_grad():
            theta -= 8 * gradient
    assert all(b > a for a, b in itertools.pairwise(ratios))
    settled = [norm for norm, ratio in zip(norms, ratios, strict=True) if ratio > 10]
    assert settled, ratios[-1]
    assert max(settled) < 1e-4 * norms[0]


def test_the_same_toy_through_chunks_of_logits():
    """The head is the policy: what it reads is one, and its weight the free logits."""
    weight = torch.zeros(2, 1, requires_grad=True)
    logps = labelled_logps(torch.ones(2, 1), weight, torch.tensor([0, 1]), chunk=1)
    dpo_terms(logps, torch.full((2,), -LN2), DPOSettings(beta=1.0))["loss"].mean().backward()
    assert weight.grad[:, 0].tolist() == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"beta": 0.0}, r"beta=0.0: expected a number above 0"),
        ({"beta": math.inf}, r"beta=inf"),
        ({"loss": "hinge"}, r"loss='hinge': expected one of sigmoid, ipo"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5: expected a number from 0 to below 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, r"label_smoothing=0.1"),
    ],
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(RecipeError, match=f"DPO cannot use {match}"):
        DPOSettings(**settings)
