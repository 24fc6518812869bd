"""What steering refuses, when it is made or attached: the message names the value, and no hook is left."""

from __future__ import annotations

import pytest
import torch

from lightning_interp import All, Generated, GenerationSteps, Last, Prompt, Site, Span, StepContext, Tokens
from lightning_interp.errors import CompiledModelError, IncompatibleModelError, PositionError, RecipeError, SiteError
from lightning_interp.steering import (
    AddDirection,
    AffineMap,
    ClampDirection,
    LinearDecay,
    ProjectOut,
    SteeringVector,
    StepFactors,
    WarmUp,
    model_fingerprint,
)
from lightning_interp.testing import tiny_model

WIDTH = 32
SITE = Site("resid_post", 1)


def vector(k=0):
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(k))


def run(model, rows):
    with torch.no_grad():
        return model(input_ids=torch.arange(6).repeat(rows, 1)).logits


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


# What is refused, when it is made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddDirection(torch.zeros(WIDTH), site=SITE), "is zero in all its 32 numbers"),
        (lambda: AddDirection(torch.tensor([1.0, float("nan")]), site=SITE), r"holds nan at index \[1\]"),
        (lambda: AddDirection(torch.tensor([float("inf"), 1.0]), site=SITE), r"holds inf at index \[0\]"),
        (lambda: AddDirection(torch.ones(2, 3), site=SITE), r"shape \[2, 3\]"),
        (lambda: AddDirection("kindness", site=SITE), "'kindness' is no steering vector"),
        (lambda: AddDirection(object(), site=SITE), "<object object at .* no vector"),
        (lambda: AddDirection(vector(), site=SITE, strength=float("nan")), "strength=nan"),
        (lambda: AddDirection(vector(), site=SITE, strength=torch.ones(2, 2)), r"shape \[2, 2\]"),
        (lambda: AddDirection(vector(), site=SITE, strength=[]), r"strength=\[\]"),
        (lambda: AddDirection(vector(), site=SITE, strength=True), "strength=True"),
        (lambda: AddDirection(vector(), site=SITE, strength="strong"), "strength='strong'"),
        (lambda: AddDirection(vector(), site=SITE, check_model="maybe"), "check_model='maybe'"),
        (lambda: AddDirection({"resid_post.1": vector()}, site=SITE), "beside a mapping of 1 sites"),
        (lambda: ProjectOut(torch.stack([vector(), 2 * vector()]), site=SITE), "direction 1 of 2 lies in the span"),
        (lambda: ProjectOut(torch.stack([vector(), 0 * vector()]), site=SITE), "direction 1, is zero"),
        (lambda: ProjectOut(torch.randn(5, 4), site=SITE), "direction 0 of 5 lies in the span"),
        (lambda: ProjectOut([torch.ones(3), torch.ones(4)], site=SITE), "widths 3, 4"),
        (lambda: ClampDirection(vector(), site=SITE), "got no value"),
        (lambda: ClampDirection(vector(), to=1.0, low=0.0, site=SITE), r"'to': 1.0, 'low': 0.0"),
        (lambda: ClampDirection(vector(), low=2.0, high=1.0, site=SITE), r"low=2.0, high=1.0"),
        (lambda: ClampDirection(vector(), to=float("nan"), site=SITE), "to=nan"),
        (lambda: AffineMap(site=SITE), "matrix=None and bias=None"),
        (lambda: AffineMap(torch.eye(4), site=SITE), "identity of width 4"),
        (lambda: AffineMap((torch.zeros(4, 1), torch.ones(1, 4)), site=SITE), "identity of width 4"),
        (lambda: AffineMap(torch.ones(3, 4), site=SITE), r"got \[3, 4\]"),
        (lambda: AffineMap((torch.ones(4, 2), torch.ones(3, 4)), site=SITE), r"\[4, 2\] and \[3, 4\]"),
        (lambda: AffineMap(torch.ones(4, 4), torch.ones(5), site=SITE), r"a bias \[5\]"),
        (lambda: AffineMap(torch.ones(4), site=SITE), r"shape \[4\]"),
        (lambda: AffineMap([["a"]], site=SITE), "no tensor"),
        (lambda: AffineMap({SITE: torch.ones(4, 4)}, {"mlp_out.1": torch.ones(4)}), "biases at mlp_out.1"),
        (lambda: AddDirection(vector(), site=SITE, schedule="linear"), "schedule='linear'"),
        (lambda: AddDirection(vector(), site=SITE, schedule=[]), "never steers"),
        (lambda: StepFactors((0.0, 0.0)), r"\(0.0, 0.0\)"),
        (lambda: LinearDecay(0), r"LinearDecay\(steps=0"),
        (lambda: WarmUp(2, start=float("inf")), "start=inf"),
    ],
)
def test_wrong_values_are_refused_when_made(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Tokens(()), r"Tokens\(ids=\(\)\)"),
        (Span(3, 3, strict=False), r"Span\(start=3, stop=3"),
        (~All(), r"Not\(inner=All"),
        (All() & ~All(), "can never choose"),
        (Last() & ~Last(), "can never choose"),
        (Prompt() & Generated(), "can never choose"),
        (GenerationSteps(0, 2) & GenerationSteps(2), "can never choose"),
        (Tokens(()) | Span(-1, -3), "can never choose"),
        ("last", "positions='last'"),
    ],
)
def test_selectors_that_choose_nothing_are_refused_when_made(where, message):
    with pytest.raises(PositionError, match=message):
        AddDirection(vector(), site=SITE, positions=where)


@pytest.mark.parametrize("where", [~Tokens(()), Span(-1, 0), Span(0), Span(-3, -1), Prompt() | Generated(3), ~Last()])
def test_selectors_that_may_choose_something_are_taken(where):
    assert AddDirection(vector(), site=SITE, positions=where).positions == where


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddDirection(vector()), "got no site"),
        (lambda: AddDirection(vector(), site=[]), "names no site"),
        (lambda: AddDirection(vector(), site=["resid_post.1", SITE]), "resid_post.1 twice"),
        (lambda: AddDirection(vector(), site="resid_posr.1"), "'resid_posr'"),
        (lambda: AddDirection(vector(), site="resid_post"), "needs a layer"),
        (lambda: AddDirection(SteeringVector({SITE: vector()}), site="resid_post.2"), "no direction at resid_post.2"),
    ],
)
def test_wrong_sites_are_refused_when_made(make, message):
    with pytest.raises(SiteError, match=message):
        make()


# What is refused when it is attached, with no hook left


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AddDirection(vector(), site="resid_post.9"), SiteError, "layers 0 to 2, but got layer 9"),
        (lambda: AddDirection(torch.ones(31), site=SITE), IncompatibleModelError, "width 31, but resid_post.1"),
        (lambda: AddDirection(vector(), site="linear:up.1"), IncompatibleModelError, "linear:up.1 of .* width 64"),
        (lambda: AddDirection(vector(), site="logits"), IncompatibleModelError, "has width 261"),
        (
            lambda: AddDirection(vector(), site=["resid_post.2", "resid_post.-1"]),
            SiteError,
            "resid_post.2 and as resid_post.-1",
        ),
        (lambda: ProjectOut(torch.ones(2, 30) + torch.eye(2, 30), site=SITE), IncompatibleModelError, "width 30"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_attach(model, make, error, message):
    before = hooks(model)
    with pytest.raises(error, match=message):
        make().attach(model)
    assert hooks(model) == before


def test_a_compiled_model_is_refused():
    compiled = tiny_model("llama")
    compiled.compile(backend="eager")
    with pytest.raises(CompiledModelError, match="is compiled"):
        AddDirection(vector(), site=SITE).attach(compiled)


def test_a_width_that_only_the_pass_tells_is_refused_there():
    steer = AddDirection(vector(), site=SITE)
    with pytest.raises(IncompatibleModelError, match=r"width 32, but the activation at resid_post.1 is \[1, 2, 8\]"):
        steer.transform(SITE, torch.ones(1, 2, 8), StepContext(1, 2))


def test_a_schedule_of_another_shape_is_refused(model):
    steer = AddDirection(vector(), site=SITE, schedule=lambda steps: steps[0])
    with steer.attach(model), pytest.raises(RecipeError, match=r"gave \[6\] for steps \[2, 6\]"):
        run(model, 2)


def test_a_vector_of_another_model(model):
    other = tiny_model("llama", seed=1)
    theirs = SteeringVector({SITE: vector()}, concept="mood", fingerprint=model_fingerprint(other))
    ours = SteeringVector({SITE: vector()}, concept="mood", fingerprint=model_fingerprint(model))
    AddDirection(ours).attach(model).remove()
    before = hooks(model)
    with pytest.raises(IncompatibleModelError, match=r"'mood', resid_post 1.*check_model='warn'"):
        AddDirection(theirs).attach(model)
    with pytest.warns(UserWarning, match="'mood'"):
        AddDirection(theirs, check_model="warn").attach(model).remove()
    AddDirection(theirs, check_model="off").attach(model).remove()
    assert hooks(model) == before


def test_a_vector_that_names_another_family_is_warned_of(model):
    foreign = SteeringVector({SITE: vector()}, model_type="gpt_neox")
    with pytest.warns(UserWarning, match="'gpt_neox'.*'llama'"):
        AddDirection(foreign).attach(model).remove()
