"""Vectors and how they are extracted: against NumPy and SciPy, and everything that is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize

from lightning_interp import All, Last, Site, Span, Substring
from lightning_interp.errors import (
    DataError,
    IncompatibleModelError,
    ManifestError,
    PositionError,
    RecipeError,
    SiteError,
)
from lightning_interp.steering import (
    METHODS,
    AddDirection,
    SteeringVector,
    direction_between,
    extract_vector,
    model_fingerprint,
    text_features,
)
from lightning_interp.testing import byte_tokenizer, tiny_model
from lightning_interp.testing.snapshot import snapshot

pytestmark = pytest.mark.kernels

TOKENIZER = byte_tokenizer()
POSITIVE = ["it was good", "a lovely day out", "so kind", "we won the game", "warm sun, soft sand"]
NEGATIVE = ["it was bad", "a dreadful day out", "so rude", "we lost the game", "cold rain, hard rock"]
SITES = [Site("resid_post", 1), Site("mlp_out", 2)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def slowly(model, texts, layer, choose=lambda states: states[-1]):
    """One text at a time, from the states that transformers itself gives, ``[n, d]`` in float64."""
    rows = []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[layer + 1][0]
        rows.append(choose(states).double())
    return torch.stack(rows).numpy()


def draw(seed, n=12, d=6, shift=1.0):
    generator = torch.Generator().manual_seed(seed)
    plus, minus = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return plus + shift * torch.arange(d), minus


def scaled(axis, gap):
    unit = axis / np.linalg.norm(axis)
    return unit * (unit @ gap)


# Reading


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_features_are_what_transformers_holds(family):
    model, texts = tiny_model(family), POSITIVE + NEGATIVE
    expected = slowly(model, texts, 1)
    for budget in (10, 60, 4096):
        found = torch.zeros(len(texts), 32)
        for numbers, rows in text_features(model, TOKENIZER, texts, SITES[:1], token_budget=budget):
            found[numbers] = rows[SITES[0]]
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_features_are_means_over_the_chosen_tokens(model):
    (numbers, rows), *rest = text_features(model, TOKENIZER, POSITIVE, SITES[:1], positions=Span(0, 3) | Last())
    expected = slowly(model, POSITIVE, 1, lambda states: states[[0, 1, 2, -1]].mean(0))
    assert not rest
    np.testing.assert_allclose(rows[SITES[0]].numpy(), expected[numbers], atol=2e-5)


def test_the_heads_input_is_read_at_the_right_token(model):
    last = len(model.model.layers) - 1  # of which transformers gives the state that the head reads
    expected = slowly(model, POSITIVE, last)
    (numbers, rows), *_ = text_features(model, TOKENIZER, POSITIVE, [Site("unembed_in")])
    np.testing.assert_allclose(rows[Site("unembed_in")].numpy(), expected[numbers], atol=2e-5)


def test_reading_leaves_the_model_as_it_was(model):
    net = tiny_model("llama").train()
    before = snapshot(net)
    extract_vector(net, TOKENIZER, POSITIVE, NEGATIVE, method="pca")
    after = snapshot(net)
    assert after == before


# Directions


@pytest.mark.parametrize("method", METHODS)
def test_extraction_is_the_direction_between_the_states(model, method):
    seen = []
    vector = extract_vector(
        model, TOKENIZER, POSITIVE, NEGATIVE, method=method, site=SITES, concept="mood", token_budget=40,
        advance=seen.append,
    )  # fmt: skip
    assert sum(seen) == 10
    plus, minus = (torch.from_numpy(slowly(model, texts, 1)) for texts in (POSITIVE, NEGATIVE))
    expected = direction_between(plus, minus, method)
    torch.testing.assert_close(vector.only(SITES[0]).double(), expected, atol=2e-5, rtol=1e-4)
    norms = torch.cat([plus, minus]).norm(dim=1)
    assert vector.scale[SITES[0]] == pytest.approx(float(norms.mean()), rel=1e-5)


def test_mean_difference_is_the_difference_of_means():
    plus, minus = draw(0)
    np.testing.assert_allclose(
        direction_between(plus, minus[:7], "mean_difference").numpy(),
        plus.numpy().mean(0) - minus.numpy()[:7].mean(0),
        atol=1e-12,
    )


@given(st.integers(0, 2**16), st.floats(-3, 3).filter(lambda shift: abs(shift) > 0.05))
def test_pca_is_the_first_right_singular_vector_of_the_differences(seed, shift):
    plus, minus = draw(seed, shift=shift)
    differences, gap = (plus - minus).numpy(), (plus.mean(0) - minus.mean(0)).numpy()
    for method, rows in (("pca", differences), ("pca_centred", differences - differences.mean(0))):
        axis = np.linalg.svd(rows)[2][0]
        found = direction_between(plus, minus, method).numpy()
        np.testing.assert_allclose(found, scaled(axis, gap), atol=1e-9)
        assert found @ gap >= -1e-12  # towards the positive side
        mirrored = direction_between(minus, plus, method).numpy()
        np.testing.assert_allclose(mirrored, -found, atol=1e-9)


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("d", [3, 40])
def test_logistic_is_the_minimum_that_scipy_finds(l2, d):
    plus, minus = draw(1, n=10, d=d, shift=0.2)
    x, s = torch.cat([plus, minus]).numpy(), np.repeat([1.0, -1.0], 10)

    def loss(w):
        return np.logaddexp(0, -s * (x @ w[:-1] + w[-1])).sum() + l2 / 2 * w[:-1] @ w[:-1]

    def slope(w):
        pull = -s / (1 + np.exp(s * (x @ w[:-1] + w[-1])))
        return np.append(x.T @ pull + l2 * w[:-1], pull.sum())

    best = minimize(loss, np.zeros(d + 1), jac=slope, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-9})
    gap = (plus.mean(0) - minus.mean(0)).numpy()
    found = direction_between(plus, minus, "logistic", l2=l2).numpy()
    np.testing.assert_allclose(found, scaled(best.x[:-1], gap), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_strength_1_carries_one_mean_as_far_as_the_other(method):
    plus, minus = draw(3)
    v = direction_between(plus, minus, method)
    moved = minus.mean(0) + v
    assert float((moved - plus.mean(0)) @ v) == pytest.approx(0.0, abs=1e-9)


def test_what_is_known_comes_along(model):
    vector = extract_vector(model, TOKENIZER, POSITIVE, NEGATIVE[:3], concept="mood", positions=All())
    assert [str(site) for site in vector.sites] == [f"resid_post.{layer}" for layer in range(len(model.model.layers))]
    assert (vector.concept, vector.method, vector.model_type, vector.n) == ("mood", "mean_difference", "llama", 8)
    assert vector.fingerprint == model_fingerprint(model)
    assert vector.positions == {"kind": "All"}
    assert set(vector.scale) == set(vector.sites)


def test_a_vector_does_what_it_stands_for(model):
    """Added to the negative texts at strength 1, their mean state is that of the positive ones."""
    site = SITES[0]
    vector = extract_vector(model, TOKENIZER, POSITIVE, NEGATIVE, site=site)
    with AddDirection(vector, positions=Last()).attach(model):
        found = torch.cat([rows[site] for _, rows in text_features(model, TOKENIZER, NEGATIVE, [site])])
    torch.testing.assert_close(
        found.double().mean(0), torch.from_numpy(slowly(model, POSITIVE, 1)).mean(0), atol=2e-5, rtol=1e-4
    )


# Arithmetic


def made(**directions):
    return SteeringVector({name.replace("_at_", "."): value for name, value in directions.items()}, concept="c")


def test_arithmetic_by_hand():
    a, b = made(resid_post_at_1=[3.0, 0.0], resid_post_at_2=[0.0, 2.0]), made(resid_post_at_1=[1.0, 4.0])
    assert (a + b).only("resid_post.1").tolist() == [4.0, 4.0]
    assert (a + b).only("resid_post.2").tolist() == [0.0, 2.0]
    assert (a - b).only("resid_post.1").tolist() == [2.0, -4.0]
    assert (b - a).only("resid_post.2").tolist() == [0.0, -2.0]
    assert (2 * a).only("resid_post.1").tolist() == (a * 2.0).only("resid_post.1").tolist() == [6.0, 0.0]
    assert (a / 2).only("resid_post.1").tolist() == [1.5, 0.0]
    assert a.normalised().norms() == {Site("resid_post", 1): 1.0, Site("resid_post", 2): 1.0}
    assert b.without(a).only().tolist() == [0.0, 4.0]
    assert a.cosine(b) == {Site("resid_post", 1): pytest.approx(1 / 17**0.5)}
    assert (a + b).concept == "c + c"


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3), st.floats(0.1, 10))
def test_arithmetic_obeys_its_laws(numbers, k):
    base = torch.tensor([5.0, -7.0, 11.0])
    a, b = made(resid_post_at_0=base + torch.tensor(numbers)), made(resid_post_at_0=base.flip(0))
    close = torch.testing.assert_close
    close((a + b).only(), (b + a).only())
    close((k * (a + b)).only(), (k * a + k * b).only(), atol=1e-3, rtol=1e-5)
    close((a + b - b).only(), a.only(), atol=1e-4, rtol=1e-5)
    assert abs(float(a.without(b).only() @ b.only())) < 1e-3
    assert next(iter((k * a).cosine(a).values())) == pytest.approx(1.0)


def test_vectors_of_two_models_do_not_mix():
    one = SteeringVector({"resid_post.1": [1.0, 2.0]}, concept="kind", fingerprint="ab" * 32)
    other = SteeringVector({"resid_post.1": [1.0, 3.0]}, concept="rude", fingerprint="cd" * 32)
    unknown = SteeringVector({"resid_post.1": [1.0, 3.0]}, concept="rude")
    for mix in (lambda: one + other, lambda: one - other, lambda: one.cosine(other), lambda: one.without(other)):
        with pytest.raises(IncompatibleModelError, match=r"abababababab.*cdcdcdcdcdcd"):
            mix()
    assert (one + unknown).fingerprint == one.fingerprint
    with pytest.raises(IncompatibleModelError, match=r"width 2 at resid_post.1, .* has 3"):
        one + made(resid_post_at_1=[1.0, 2.0, 3.0])
    with pytest.raises(IncompatibleModelError, match=r"one has resid_post.1, the other resid_post.2"):
        one.cosine(made(resid_post_at_2=[1.0, 2.0]))
    with pytest.raises(RecipeError, match=r"'kind', resid_post 1.* lies along"):
        one.without(2 * one)
    with pytest.raises(RecipeError, match="is zero in all its 2 numbers"):
        one - one
    with pytest.raises(TypeError):
        one * torch.ones(2)


# Files


def test_a_file_gives_everything_back(tmp_path, model):
    vector = extract_vector(model, TOKENIZER, POSITIVE, NEGATIVE, concept="mood", site=SITES)
    path = vector.save(tmp_path / "deep" / "mood.safetensors")
    again = SteeringVector.load(path)
    assert again.describe() == vector.describe()
    assert all(torch.equal(again.only(site), vector.only(site)) for site in vector.sites)
    with safe_open(path, "pt") as file:  # as any other program reads it
        assert sorted(file.keys()) == ["mlp_out.2", "resid_post.1"]
        assert json.loads(file.metadata()["about"])["concept"] == "mood"
    assert json.loads(json.dumps(vector.describe())) == vector.describe()


def test_a_trained_direction_is_saved_as_it_is_now(tmp_path):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    vector = SteeringVector({"resid_post.0": parameter})
    with torch.no_grad():
        parameter.add_(1.0)
    loaded = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    assert loaded.only().tolist() == [2.0, 3.0]
    assert not loaded.only().requires_grad


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = made(resid_post_at_1=[1.0]).save(tmp_path / "v.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ManifestError, match="No space left"):
        made(resid_post_at_1=[2.0]).save(path)
    monkeypatch.undo()
    assert SteeringVector.load(path).only().tolist() == [1.0]
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


@pytest.mark.parametrize(("method", "gap"), [("pca_centred", 1.0), ("pca", 0.0), ("pca_centred", 0.0)])
def test_pairs_that_all_differ_alike_have_no_axis(method, gap):
    minus = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(DataError, match=rf"Method '{method}' finds no axis: the 5 differences .* are all equal"):
        direction_between(minus + gap * torch.tensor([1.0, 2.0, 0.0, -1.0]), minus, method)


def test_a_vector_written_twice_has_one_hash(tmp_path):
    same = made(resid_post_at_1=[1.0], resid_post_at_0=[2.0]), made(resid_post_at_0=[2.0], resid_post_at_1=[1.0])
    found = {vector.save(tmp_path / "v.safetensors").read_bytes() for vector in same * 8}
    assert len(found) == 1


def test_files_that_are_no_vectors(tmp_path):
    with pytest.raises(DataError, match=r"'gone.safetensors'"):
        SteeringVector.load("gone.safetensors")
    with pytest.raises(RecipeError, match=r"'vector.pt' is no steering vector"):
        SteeringVector.load("vector.pt")
    with pytest.raises(RecipeError, match=r"'vector.bin' is no steering vector"):
        made(resid_post_at_1=[1.0]).save("vector.bin")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, foreign)
    with pytest.raises(DataError, match=r"foreign.safetensors holds no steering vector \(its format is None"):
        SteeringVector.load(foreign)
    form = {"format": "lightning_interp.steering_vector/1"}
    for name, metadata, message in (
        ("resid_post.1", {**form}, "'about'"),
        ("resid_post.1", {**form, "about": "{"}, r"holds no steering vector \(Expecting .*save"),
        ("resid_post.1", {**form, "about": '{"colour": "red"}'}, "colour"),
        ("somewhere.1", {**form, "about": "{}"}, "'somewhere'"),
    ):
        save_file({name: torch.ones(2)}, foreign, metadata=metadata)
        with pytest.raises(DataError, match=message):
            SteeringVector.load(foreign)
    foreign.write_bytes(foreign.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"holds no steering vector \(Cannot read the tensors of .*foreign"):
        SteeringVector.load(foreign)


# What is refused


@pytest.mark.parametrize(
    ("directions", "error", "message"),
    [
        ({}, RecipeError, r"directions=\{\}"),
        (torch.ones(3), RecipeError, r"directions=tensor"),
        ({"resid_post.1": torch.zeros(3)}, RecipeError, "The direction at resid_post.1 of 'mood' is zero"),
        ({"resid_post.1": [1.0, float("nan")]}, RecipeError, "at resid_post.1 of 'mood' holds nan"),
        ({"resid_post.1": torch.ones(2, 2)}, RecipeError, r"shape \[2, 2\]"),
        ({"resid_post": [1.0]}, SiteError, "needs a layer"),
        ({"blocks.1": [1.0]}, SiteError, "'blocks'"),
    ],
)
def test_wrong_vectors_are_refused(directions, error, message):
    with pytest.raises(error, match=message):
        SteeringVector(directions, concept="mood")


def test_a_site_that_a_vector_lacks():
    vector = made(resid_post_at_1=[1.0], mlp_out_at_2=[1.0])
    with pytest.raises(SiteError, match=r"no direction at resid_post.7; it has: resid_post.1, mlp_out.2"):
        vector.only("resid_post.7")
    with pytest.raises(SiteError, match=r"resid_post.1, mlp_out.2\. Say which"):
        vector.only()
    with pytest.raises(SiteError, match=r"no direction at resid_post.3"):
        vector.select(["resid_post.3"])


@pytest.mark.parametrize(
    ("positive", "negative", "settings", "error", "message"),
    [
        (POSITIVE, NEGATIVE, {"method": "mean"}, RecipeError, "no method 'mean'"),
        (POSITIVE, [], {}, DataError, r"negative=\[\]"),
        ("it was good", NEGATIVE, {}, DataError, "positive='it was good'"),
        (POSITIVE, NEGATIVE[:3], {"method": "pca"}, DataError, "5 positive and 3 negative texts"),
        (POSITIVE, ["it was bad", ""], {}, DataError, r"Text 6 \(''\) has no tokens"),
        (["same", "text"], ["same", "text"], {"concept": "mood"}, DataError, "look alike for 'mood' at resid_post.0"),
        (POSITIVE, NEGATIVE, {"site": "resid_post.8"}, SiteError, "got layer 8"),
        (POSITIVE, NEGATIVE, {"positions": ~All()}, PositionError, "can never choose"),
        (POSITIVE, NEGATIVE, {"positions": Substring("day", missing="ignore")}, PositionError, "no token of text"),
        (POSITIVE, NEGATIVE, {"method": "logistic", "l2": -1.0}, RecipeError, "l2=-1.0"),
    ],
)
def test_what_cannot_be_extracted(model, positive, negative, settings, error, message):
    with pytest.raises(error, match=message):
        extract_vector(model, TOKENIZER, positive, negative, **settings)


def test_activations_that_overflow():
    net = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(DataError, match=r"Text \d gives activations that are not finite"):
        extract_vector(net, TOKENIZER, POSITIVE, NEGATIVE)


def test_a_method_that_is_none():
    with pytest.raises(RecipeError, match="no method 'median'"):
        direction_between(*draw(0), "median")
