"""Streamed class means against numpy on all states at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_interp.core.model.sites import Site
from lightning_interp.errors import DataError, IncompatibleModelError, ManifestError, RecipeError
from lightning_interp.steering.concepts.moments import ClassMoments, StreamedSums

pytestmark = pytest.mark.kernels

WIDTH = 5


def draw(n, seed=0, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    lam = torch.randn(n, WIDTH, generator=rng, dtype=torch.float64) + shift
    phi = torch.randn(n, WIDTH, generator=rng, dtype=torch.float64)
    labels = torch.randint(-1, 2, (n,), generator=rng)
    return lam, phi, labels


def reference(lam, phi, labels):
    """Means and pooled covariance, by numpy."""
    parts = [(lam[labels == c].numpy(), phi[labels == c].numpy()) for c in (0, 1)]
    covariance = sum((len(x) - 1) * np.cov(x, rowvar=False) for x, _ in parts) / (sum(len(x) for x, _ in parts) - 2)
    return [x.mean(0) for x, _ in parts], [y.mean(0) for _, y in parts], covariance


def check(moments, lam, phi, labels, tolerance=1e-12):
    means, duals, covariance = reference(lam, phi, labels)
    assert moments.counts == (int((labels == 0).sum()), int((labels == 1).sum()))
    for i, name in enumerate(("base", "target")):
        np.testing.assert_allclose(moments.mean(name).numpy(), means[i], atol=tolerance)
        np.testing.assert_allclose(moments.dual_mean(name).numpy(), duals[i], atol=tolerance)
    np.testing.assert_allclose(moments.covariance().numpy(), covariance, atol=tolerance)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("size", [1, 7, 200])
def test_batches_give_what_all_at_once_gives(size, named):
    lam, phi, labels = draw(200)
    moments = ClassMoments(WIDTH, scatter=True)
    ids = torch.arange(1000, 1200) if named else None
    for i in range(0, 200, size):
        part = slice(i, i + size)
        moments.update(lam[part], labels[part], phi[part], None if ids is None else ids[part])
    check(moments, lam, phi, labels)


def test_a_large_mean_costs_the_scatter_no_digits():
    lam, phi, labels = draw(300, shift=1e6)
    moments = ClassMoments(WIDTH, scatter=True)
    for part in range(0, 300, 3):
        moments.update(lam[part : part + 3], labels[part : part + 3], phi[part : part + 3])
    check(moments, lam, phi, labels, tolerance=1e-6)
    naive = lam[labels == 0].T @ lam[labels == 0] / 300 - 1e12
    assert abs(float(naive[0, 0])) > 1e-3  # what uncentred sums would give is off by more than that


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_a_state_that_comes_again_counts_once(names, size, seed):
    lam, phi, labels = draw(31, seed)
    labels = labels.abs()
    moments = ClassMoments(WIDTH, scatter=True)
    order = torch.tensor(names)
    for i in range(0, len(order), size):
        rows = order[i : i + size]
        moments.update(lam[rows], labels[rows], phi[rows], rows)
    kept = torch.tensor(sorted(set(names)))
    counts = tuple(int((labels[kept] == c).sum()) for c in (0, 1))
    assert moments.counts == counts
    for c, name in enumerate(("base", "target")):
        if counts[c]:
            expected = lam[kept][labels[kept] == c].mean(0)
            torch.testing.assert_close(moments.mean(name), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("named", [False, True])
def test_parts_add_up(named):
    lam, phi, labels = draw(120)
    parts = []
    for rows in torch.arange(120).split(40):
        part = ClassMoments(WIDTH, scatter=True)
        for few in rows.split(8):
            part.update(lam[few], labels[few], phi[few], few if named else None)
        parts.append(part)
    check(parts[0] + parts[1] + parts[2], lam, phi, labels)
    check(parts[2] + (parts[1] + parts[0]), lam, phi, labels)
    check(parts[0] + parts[1] + parts[2] + ClassMoments(WIDTH, scatter=True), lam, phi, labels)


def sampler(n, world):
    """Indices of every rank, as a distributed sampler without shuffling deals and pads them."""
    indices = list(range(n))
    indices += indices[: -n % world]
    return [torch.tensor(indices[rank::world]) for rank in range(world)]


@pytest.mark.parametrize(("n", "world"), [(7, 2), (10, 4), (9, 4), (5, 3)])
def test_what_a_sampler_pads_counts_once(n, world):
    lam, phi, labels = draw(n, seed=3)
    labels = torch.arange(n) % 2
    parts = []
    for rows in sampler(n, world):
        part = ClassMoments(WIDTH, scatter=True)
        for few in rows.split(1):
            part.update(lam[few], labels[few], phi[few], few)
        parts.append(part)
    assert sum(sum(p.counts) for p in parts) == n + (-n % world)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    check(total, lam, phi, labels)


def test_what_cannot_be_taken_back_is_refused():
    lam, phi, labels = draw(6)
    labels = labels.abs()
    parts = []
    for order in ([0, 1, 2, 3], [0, 4, 5]):
        part = ClassMoments(WIDTH)
        for row in order:
            part.update(lam[[row]], labels[[row]], phi[[row]], torch.tensor([row]))
        parts.append(part)
    with pytest.raises(DataError, match=r"1 states \(the first has id 0\) were counted by two processes"):
        parts[0] + parts[1]


def _rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        lam, phi, _ = draw(7, seed=3)
        labels = torch.arange(7) % 2
        moments = ClassMoments(WIDTH, scatter=True)
        for few in sampler(7, 2)[rank].split(2):
            moments.update(lam[few], labels[few], phi[few], few)
        total = moments.reduced()
        results.put((total.counts, total.mean("base").tolist(), total.dual_mean("target").tolist()))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_agree_and_count_once():
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, os.environ["MASTER_PORT"], results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    assert found[0] == found[1]
    lam, phi, _ = draw(7, seed=3)
    labels = torch.arange(7) % 2
    assert found[0][0] == (4, 3)
    np.testing.assert_allclose(found[0][1], lam[labels == 0].mean(0), atol=1e-12)
    np.testing.assert_allclose(found[0][2], phi[labels == 1].mean(0), atol=1e-12)


def test_without_a_process_group_nothing_is_reduced():
    moments = ClassMoments(WIDTH)
    assert moments.reduced() is moments


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_states_are_summed_in_float64(dtype):
    lam = torch.full((4096, 1), 0.1).to(dtype)
    moments = ClassMoments(1, dual=False)
    moments.update(lam, torch.zeros(4096, dtype=torch.long))
    assert moments.mean("base").dtype == torch.float64
    assert float(moments.mean("base")) == float(lam[0, 0].double())


def test_what_was_summed_in_inference_mode_can_be_used_in_autograd():
    moments = ClassMoments(2, dual=False)
    with torch.inference_mode():
        for ids in ([0, 1], [2, 3]):
            moments.update(torch.ones(2, 2), torch.tensor([0, 1]), ids=torch.tensor(ids))
    moments.update(torch.ones(1, 2), torch.tensor([0]), ids=torch.tensor([9]))
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (moments.mean("base") @ weight).square().backward()
    assert bool(weight.grad.any())


def test_memory_does_not_grow_with_states():
    moments = ClassMoments(WIDTH)
    lam, phi, labels = draw(64)
    sizes = []
    for _ in range(3):
        for _ in range(50):
            moments.update(lam, labels, phi)
        sizes.append(len(pickle.dumps(moments)))
    assert max(sizes) - min(sizes) <= 8


@pytest.mark.parametrize(("dual", "scatter"), [(True, False), (False, True), (True, True)])
def test_a_file_gives_them_back(tmp_path, dual, scatter):
    lam, phi, labels = draw(50)
    kept = ClassMoments(WIDTH, dual=dual, scatter=scatter, fingerprint="f" * 64, site=Site("resid_post", 2))
    for rows in torch.arange(50).split(16):
        kept.update(lam[rows], labels[rows], phi[rows] if dual else None, rows)
    again = ClassMoments.load(kept.save(tmp_path / "a" / "moments.safetensors"))
    assert (again.counts, again.fingerprint, again.site) == (kept.counts, kept.fingerprint, kept.site)
    assert (again.dual, again.scatter) == (dual, scatter)
    for name in ("base", "target"):
        assert torch.equal(again.mean(name), kept.mean(name))
        if dual:
            assert torch.equal(again.dual_mean(name), kept.dual_mean(name))
    if scatter:
        assert torch.equal(again.covariance(), kept.covariance())


class TestErrors:
    def test_a_width_that_is_none(self):
        with pytest.raises(RecipeError, match=r"ClassMoments\(width=0\)"):
            ClassMoments(0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lam": torch.ones(3, 4)}, r"States of shape \[3, 4\] do not fit moments of width 5; expected \[3, 5\]"),
            ({"lam": torch.ones(3, 2, 5)}, r"States of shape \[3, 2, 5\]"),
            ({"phi": torch.ones(2, 5)}, r"Dual coordinates of shape \[2, 5\]"),
            ({"labels": torch.zeros(4)}, r"Labels of shape \[4\] .* expected \[3\]"),
            ({"ids": torch.zeros(3, 1)}, r"Ids of shape \[3, 1\]"),
        ],
    )
    def test_shapes(self, change, message):
        given = {"lam": torch.ones(3, 5), "labels": torch.zeros(3), "phi": torch.ones(3, 5), "ids": None}
        with pytest.raises(IncompatibleModelError, match=message):
            ClassMoments(5).update(**{**given, **change})

    def test_missing_dual_coordinates(self):
        with pytest.raises(RecipeError, match=r"got 3 states without dual coordinates"):
            ClassMoments(5).update(torch.ones(3, 5), torch.zeros(3))
        with pytest.raises(RecipeError, match=r"moments of width 5 hold no dual"):
            ClassMoments(5, dual=False).dual_mean("base")

    def test_a_label_of_no_class(self):
        with pytest.raises(RecipeError, match=r"A label is 2; expected 0"):
            ClassMoments(5, dual=False).update(torch.ones(2, 5), torch.tensor([0, 2]))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_state_that_is_not_finite(self, value):
        lam = torch.ones(4, 5)
        lam[3, 1] = value
        moments = ClassMoments(5, dual=False)
        with pytest.raises(DataError, match=r"State 2 of the 3 chosen ones holds NaN or infinity"):
            moments.update(lam, torch.tensor([0, -1, 0, 1]))
        assert moments.counts == (0, 0)
        moments.update(lam, torch.tensor([0, -1, 0, -1]))  # left out, it does no harm
        assert moments.counts == (2, 0)

    def test_an_id_with_two_classes(self):
        moments = ClassMoments(5, dual=False)
        moments.update(torch.ones(1, 5), torch.tensor([0]), ids=torch.tensor([17]))
        with pytest.raises(DataError, match=r"State 17 is target now and was base before"):
            moments.update(torch.ones(2, 5), torch.tensor([0, 1]), ids=torch.tensor([3, 17]))
        assert moments.counts == (1, 0)
        with pytest.raises(DataError, match=r"State 4 is target now and was base before"):
            moments.update(torch.ones(2, 5), torch.tensor([0, 1]), ids=torch.tensor([4, 4]))
        other = ClassMoments(5, dual=False)
        other.update(torch.ones(1, 5), torch.tensor([1]), ids=torch.tensor([17]))
        with pytest.raises(DataError, match=r"State 17 is target now and was base before"):
            moments + other

    def test_ids_now_and_then(self):
        moments = ClassMoments(5, dual=False)
        moments.update(torch.ones(1, 5), torch.tensor([0]), ids=torch.tensor([17]))
        with pytest.raises(RecipeError, match=r"Ids came with some of the states only \(1 so far\)"):
            moments.update(torch.ones(1, 5), torch.tensor([0]))
        bare = ClassMoments(5, dual=False)
        bare.update(torch.ones(1, 5), torch.tensor([0]))
        with pytest.raises(RecipeError, match=r"Ids came with some of the states only \(0 so far\)"):
            bare.update(torch.ones(1, 5), torch.tensor([0]), ids=torch.tensor([17]))
        with pytest.raises(IncompatibleModelError, match=r"Moments with ids \(1 of them\) and without"):
            bare + moments

    def test_an_empty_class(self):
        moments = ClassMoments(5, dual=False)
        moments.update(torch.ones(2, 5), torch.zeros(2))
        with pytest.raises(DataError, match=r"There is no target state, .*: 2 base and 0 target"):
            moments.mean("target")
        with pytest.raises(RecipeError, match=r"There is no class 'neutral'"):
            moments.mean("neutral")

    def test_a_covariance_of_too_little(self):
        moments = ClassMoments(5, dual=False, scatter=True)
        moments.update(torch.ones(2, 5), torch.tensor([0, 1]))
        with pytest.raises(DataError, match="at least three states, got 1 and 1"):
            moments.covariance()
        plain = ClassMoments(5, dual=False)
        plain.update(torch.ones(2, 5), torch.tensor([0, 1]))
        with pytest.raises(RecipeError, match="moments of width 5 hold no covariance"):
            plain.covariance()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"width": 4}, "width=5 and width=4"),
            ({"dual": False}, "dual=True and dual=False"),
            ({"scatter": True}, "scatter=False and scatter=True"),
            ({"fingerprint": "abc"}, "fingerprint=None and fingerprint=abc"),
            ({"site": Site("resid_post", 1)}, r"site=None and site=resid_post\.1"),
        ],
    )
    def test_moments_of_different_things(self, options, message):
        with pytest.raises(IncompatibleModelError, match=f"Moments with {message} cannot be added"):
            ClassMoments(5) + ClassMoments(**{"width": 5, **options})

    def test_files(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.safetensors holds no class moments"):
            ClassMoments.load(tmp_path / "none.safetensors")
        (tmp_path / "text.safetensors").write_text("no tensors")
        with pytest.raises(DataError, match=r"text\.safetensors holds no class moments"):
            ClassMoments.load(tmp_path / "text.safetensors")
        save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors", metadata={"format": "somebody/2"})
        with pytest.raises(DataError, match=r"other\.safetensors .*its format is 'somebody/2'"):
            ClassMoments.load(tmp_path / "other.safetensors")
        (tmp_path / "file").write_text("")
        with pytest.raises(ManifestError, match=r"Cannot write '.*/file/m\.safetensors'"):
            ClassMoments(5).save(tmp_path / "file" / "m.safetensors")


def test_sums_of_nothing():
    nothing = StreamedSums.of(torch.zeros(0, 3, dtype=torch.float64), square=2)
    assert bool(nothing.mean.isnan().all())
    something = StreamedSums.of(torch.ones(2, 3, dtype=torch.float64), square=2)
    assert (nothing + something) is something
    assert (something + nothing) is something
