"""Seeds that depend on their purpose alone, and digests of weights."""

from __future__ import annotations

import torch
from torch import nn

from lightning_interp.core.measure.seeding import derived_seed, hashed_number, seeded_rng
from lightning_interp.core.model.fingerprint import tensor_hash, weights_digest


def test_seeds_are_fixed_numbers():
    assert derived_seed(0, "order", 1) == hashed_number("0/order/1") == 4489457307835839548
    assert len({derived_seed(root, purpose, i) for root in (0, 1) for purpose in "ab" for i in range(3)}) == 12
    assert 0 <= hashed_number("review-7") < 2**63


def test_a_seeded_block_repeats_and_leaves_no_trace():
    before = torch.get_rng_state()
    draws = []
    for seed in (7, 7, 8):
        with seeded_rng(seed):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_digests_see_values_names_and_shapes():
    module = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    digest = weights_digest(module)
    assert digest != weights_digest(other)
    other.load_state_dict(module.state_dict())
    assert digest == weights_digest(other) != weights_digest(nn.Sequential(other))
    assert tensor_hash(torch.ones(2)) == tensor_hash(torch.ones(2, dtype=torch.float64))
    assert tensor_hash(torch.ones(2)) != tensor_hash(torch.ones(2, 1))
