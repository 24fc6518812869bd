"""One uniform number a token: the inverse of the cumulative distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import InterpError
from lightning_interp.generation.sampling import draw_tokens, uniform_numbers


def draw(logits, uniform, temperature=1.0, top_p=1.0):
    rows = len(logits)
    return draw_tokens(
        logits, uniform, temperature=torch.full((rows,), temperature), top_p=torch.full((rows,), top_p)
    )  # fmt: skip


def by_hand(logits, u, temperature=1.0, top_p=1.0):
    """The same with Python floats: walk along the cumulative distribution."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept, mass = set(), 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.add(i)
        mass += p[i]
    total, reached = sum(p[i] for i in kept), 0.0
    for i, share in enumerate(p):
        reached += share if i in kept else 0.0
        if i in kept and reached > u * total:
            return i
    return max(i for i in kept if p[i] > 0)


@given(
    seed=st.integers(0, 10_000),
    u=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.1, 0.7, 1.0]),
)
def test_it_is_the_walk_by_hand(seed, u, temperature, top_p):
    logits = 3 * torch.randn(1, 23, generator=torch.Generator().manual_seed(seed))
    found = int(draw(logits, torch.tensor([u]).double(), temperature, top_p))
    near = {by_hand(logits[0], min(max(u + e, 0.0), 1 - 1e-16), temperature, top_p) for e in (-1e-9, 0, 1e-9)}
    assert found in near


def test_drawn_tokens_have_the_probabilities_of_the_softmax():
    """Chi-square over 40,000 draws of a fixed seed; 19 degrees of freedom, 43.8 is the 0.1 % point."""
    n, vocabulary = 40_000, 20
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    uniform = uniform_numbers([5], n)[0]
    drawn = draw(logits.expand(n, vocabulary), uniform, temperature=0.8)
    expected = (logits.double() / 0.8).softmax(-1) * n
    seen = torch.bincount(drawn, minlength=vocabulary)
    assert float(((seen - expected) ** 2 / expected).sum()) < 43.8
    assert float(((seen.roll(1) - expected) ** 2 / expected).sum()) > 43.8  # the test has power


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_forbidden_token_is_never_drawn(u):
    logits = torch.zeros(1, 9)
    logits[0, [0, 4, 8]] = -torch.inf
    assert int(draw(logits, torch.tensor([u]).double())) in {1, 2, 3, 5, 6, 7}


def test_rows_have_settings_of_their_own_and_do_not_see_each_other():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    temperature, top_p = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 0.0]), torch.tensor([1.0, 0.5, 1.0, 0.9, 1e-9, 0.2])
    together = draw_tokens(logits, uniform, temperature=temperature, top_p=top_p)
    for i in range(6):
        alone = draw(logits[i : i + 1], uniform[i : i + 1], float(temperature[i]), float(top_p[i]))
        assert int(alone) == int(together[i])
    assert together[[0, 4, 5]].tolist() == logits[[0, 4, 5]].argmax(-1).tolist()


def test_greedy_takes_the_first_of_the_largest():
    assert draw(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([0.99]).double(), temperature=0.0).tolist() == [1]


def test_numbers_of_a_row_are_its_own_and_begin_alike():
    numbers = uniform_numbers([7, 8, 7], 40)
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(uniform_numbers([8], 3)[0], numbers[1, :3])
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_to_draw(value):
    logits = torch.zeros(2, 4)
    logits[1] = value
    with pytest.raises(InterpError, match=rf"in row 1: the largest of its 4 logits is {value}"):
        draw(logits, torch.zeros(2).double())
