"""The steering family against arithmetic done by hand: what it does, where, how strongly, and when."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp import (
    ActivationCapture,
    All,
    Compose,
    Generated,
    GenerationSteps,
    Last,
    ModelMap,
    Prompt,
    Site,
    Span,
    StepContext,
)
from lightning_interp.errors import RecipeError
from lightning_interp.steering import (
    AddDirection,
    AffineMap,
    ClampDirection,
    LinearDecay,
    ProjectOut,
    SteeringVector,
    StrengthSchedule,
    WarmUp,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

WIDTH = 32
SITE = Site("resid_post", 1)
STRENGTHS = [-2.0, 0.0, 0.5, 3.0]


def vector(k=0, size=1.0, width=WIDTH):
    return size * torch.randn(width, generator=torch.Generator().manual_seed(k))


def ids(rows=1, length=6, seed=0):
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def one(steer, x, **step):
    """The member at its first site, on ``x [B, T, d]``."""
    return steer.transform(next(iter(steer.tensors)), x, StepContext(*x.shape[:2], **step))


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def members(**settings):
    """One of each, at ``SITE``."""
    return {
        "add": AddDirection(vector(), site=SITE, **settings),
        "add, norm kept": AddDirection(vector(), site=SITE, keep_norm=True, **settings),
        "project out": ProjectOut(torch.stack([vector(), vector(1)]), site=SITE, **settings),
        "affine": AffineMap(torch.outer(vector(2), vector(3)), vector(), site=SITE, **settings),
        "low rank": AffineMap((vector(2)[:, None], vector(3)[None]), site=SITE, **settings),
        "bias": AffineMap(None, vector(), site=SITE, **settings),
        "clamp": ClampDirection(vector(), to=2.0, site=SITE, **settings),
        "bound": ClampDirection(vector(), high=-0.2, site=SITE, **settings),
    }


NAMES = list(members())
every_member = pytest.mark.parametrize("name", NAMES)


# What each member does, written out


def test_add_is_addition():
    x, v = torch.randn(2, 3, WIDTH), vector()
    assert torch.equal(one(AddDirection(v, site=SITE, strength=1.0), x), x + v)
    torch.testing.assert_close(one(AddDirection(v, site=SITE, strength=-2.5), x), x - 2.5 * v)


def test_add_with_the_norm_kept_turns_only():
    x, v = torch.randn(2, 3, WIDTH, dtype=torch.float64), vector().double()
    found = one(AddDirection(v, site=SITE, strength=4.0, keep_norm=True), x)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(found, x + 4 * v, dim=-1), torch.ones(2, 3, dtype=torch.float64))


def test_keeping_the_norm_of_nothing_gives_nothing_and_no_nan():
    found = one(AddDirection(vector(), site=SITE, keep_norm=True), torch.zeros(1, 2, WIDTH))
    assert torch.equal(found, torch.zeros(1, 2, WIDTH))


def test_project_out_is_the_projector_of_the_span():
    x, rows = torch.randn(2, 3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    inside = rows.T @ torch.linalg.solve(rows @ rows.T, rows)
    for strength, expected in ((1.0, x - x @ inside), (2.0, x - 2 * x @ inside), (0.3, x - 0.3 * x @ inside)):
        found = one(ProjectOut(rows, site=SITE, strength=strength), x)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert float((one(ProjectOut(list(rows), site=SITE), x) @ rows.T).abs().max()) < 1e-9


def test_affine_forms_agree_with_matrices():
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    a, b = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    u, v = torch.randn(5, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for strength in (1.0, 0.25):
        settings = {"site": SITE, "strength": strength}
        assert torch.allclose(one(AffineMap(a, b, **settings), x), x + strength * (x @ a.T + b - x))
        assert torch.allclose(one(AffineMap(a, **settings), x), x + strength * (x @ a.T - x))
        assert torch.allclose(one(AffineMap(None, b, **settings), x), x + strength * b)
        whole = torch.eye(5, dtype=torch.float64) + u @ v
        assert torch.allclose(one(AffineMap((u, v), b, **settings), x), x + strength * (x @ whole.T + b - x))


def test_clamp_sets_and_bounds_one_coordinate_alone():
    x, v = torch.randn(4, 5, WIDTH, dtype=torch.float64), vector().double()
    unit = v / v.norm()
    across = x - (x @ unit)[..., None] * unit
    for settings, wanted in (
        ({"to": 1.5}, torch.full((4, 5), 1.5, dtype=torch.float64)),
        ({"low": 0.1}, (x @ unit).clamp_min(0.1)),
        ({"high": -0.1}, (x @ unit).clamp_max(-0.1)),
        ({"low": -0.2, "high": 0.2}, (x @ unit).clamp(-0.2, 0.2)),
    ):
        found = one(ClampDirection(v, site=SITE, **settings), x)
        torch.testing.assert_close(found @ unit, wanted)
        torch.testing.assert_close(found - (found @ unit)[..., None] * unit, across)


@given(size=st.floats(0.01, 100), a=st.floats(-5, 5), b=st.floats(-5, 5), seed=st.integers(0, 2**20))
def test_algebra_of_the_members(size, a, b, seed):
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(1, 2, 8, generator=g, dtype=torch.float64), torch.randn(8, generator=g, dtype=torch.float64)

    def add(direction, strength):
        return AddDirection(direction, site=SITE, strength=strength)

    torch.testing.assert_close(one(add(v, b), one(add(v, a), x)), one(add(v, a + b), x))
    torch.testing.assert_close(one(add(size * v, a), x), one(add(v, size * a), x))
    out = ProjectOut(v, site=SITE)
    torch.testing.assert_close(one(out, one(out, x)), one(out, x))
    torch.testing.assert_close(one(ProjectOut(size * v, site=SITE), x), one(out, x))
    mirror = ProjectOut(v, site=SITE, strength=2.0)
    torch.testing.assert_close(one(mirror, one(mirror, x)), x)
    torch.testing.assert_close(one(ClampDirection(v, to=0.0, site=SITE), x), one(out, x))


# Strengths, one a row


@every_member
def test_rows_with_strengths_of_their_own_are_runs_one_at_a_time(name, model):
    tokens = ids(len(STRENGTHS))
    with members(strength=STRENGTHS)[name].attach(model):
        together = logits(model, tokens)
    for row, strength in enumerate(STRENGTHS):
        with members(strength=strength)[name].attach(model):
            alone = logits(model, tokens)[row]
        torch.testing.assert_close(together[row], alone, atol=1e-6, rtol=1e-6)


@every_member
def test_rows_of_strength_0_keep_their_bits(name, model):
    tokens = ids(len(STRENGTHS))
    plain, mask = logits(model, tokens), torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1]] * 2)
    padded = logits(model, tokens, attention_mask=mask)
    with members(strength=STRENGTHS)[name].attach(model):
        found, found_padded = logits(model, tokens), logits(model, tokens, attention_mask=mask)
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found_padded[1], padded[1])
    assert not any(torch.equal(found[row], plain[row]) for row in (0, 2, 3))


@every_member
def test_a_number_0_is_the_plain_model_to_the_bit(name, model):
    with members(strength=0.0)[name].attach(model):
        assert torch.equal(logits(model, ids(2)), logits(tiny_model("llama"), ids(2)))


def test_beams_and_samples_of_a_prompt_share_its_strength(model):
    prompts = ids(2, 5)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    steer = {"site": SITE, "positions": Generated() | Last()}
    for beams in (2, 3):
        how = {"num_beams": beams, "do_sample": False}
        with AddDirection(vector(size=2), strength=[1.0, -3.0], **steer).attach(model):
            together = model.generate(prompts, **settings, **how)
        for row, strength in enumerate([1.0, -3.0]):
            with AddDirection(vector(size=2), strength=strength, **steer).attach(model):
                alone = model.generate(prompts, **settings, **how)
            assert together[row].tolist() == alone[row].tolist()
    with AddDirection(vector(size=2), strength=[0.0, 40.0], **steer).attach(model):
        sampled = model.generate(prompts, **settings, do_sample=True, num_return_sequences=3, temperature=1e-4)
    greedy = model.generate(prompts, **settings, do_sample=False)
    assert [row.tolist() for row in sampled[:3]] == [greedy[0].tolist()] * 3
    assert sampled[3].tolist() != greedy[1].tolist()


def test_another_number_of_rows_names_both(model):
    with (
        AddDirection(vector(), site=SITE, strength=[1.0, 2.0]).attach(model),
        pytest.raises(RecipeError, match="has 2 strengths, one a row, but the pass has 3 rows"),
    ):
        logits(model, ids(3))


# Where


def by_hand(model, tokens, change, layer=1, **more):
    """Logits with the block's output changed by a plain hook of PyTorch."""
    handle = (
        ModelMap.build(model)
        .blocks[layer]
        .register_forward_hook(
            lambda _, __, out: change(out) if isinstance(out, torch.Tensor) else (change(out[0]), *out[1:])
        )
    )
    try:
        return logits(model, tokens, **more)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
def test_every_token_or_chosen_ones_as_a_plain_hook_would(family):
    model, tokens, v = tiny_model(family), ids(2), vector(size=2)
    chosen = torch.zeros(2, 6, 1)
    chosen[:, [1, 2, 5]] = 1.0
    for where, mask in ((All(), torch.ones(2, 6, 1)), (Span(1, 3) | Last(), chosen)):
        expected = by_hand(model, tokens, lambda x, mask=mask: x + 1.5 * mask * v)
        with AddDirection(v, site=SITE, strength=1.5, positions=where).attach(model):
            torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, logits(model, tokens), atol=1e-2)


def test_padding_is_never_steered(model):
    tokens, mask = ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    seen = ActivationCapture([SITE])
    with seen.attach(model):
        logits(model, tokens, attention_mask=mask)
    before = seen.activations[SITE]
    with Compose(AddDirection(vector(), site=SITE), seen).attach(model):
        logits(model, tokens, attention_mask=mask)
    moved = (seen.activations[SITE] != before).any(dim=-1)
    assert moved.tolist() == [[False, False, True, True, True, True]]


def test_several_layers_each_with_its_own(model):
    given = {"resid_post.0": vector(0), Site("mlp_out", 1): vector(1), "attn_out.2": vector(2)}
    tokens = ids(2)
    together = AddDirection(given, strength=2.0)
    parts = [AddDirection(v, site=site, strength=2.0) for site, v in given.items()]
    with together.attach(model):
        found = logits(model, tokens)
    with Compose(*parts).attach(model):
        assert torch.equal(found, logits(model, tokens))
    assert [str(site) for site in together.sites(ModelMap.build(model))] == ["resid_post.0", "mlp_out.1", "attn_out.2"]


def test_the_same_direction_at_several_layers(model):
    with AddDirection(vector(), site=["resid_post.0", "resid_post.-1"]).attach(model):
        found = logits(model, ids())
    with AddDirection({"resid_post.0": vector(), "resid_post.2": vector()}).attach(model):
        assert torch.equal(found, logits(model, ids()))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])])
def test_the_heads_input_where_fewer_logits_are_asked_for(model, kept):
    v, tokens = vector(size=3), ids(2)
    where = Span(0) | Span(4)
    with AddDirection(v, site="unembed_in", positions=where).attach(model):
        whole, part = logits(model, tokens), logits(model, tokens, logits_to_keep=kept)
    expected = whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:]
    torch.testing.assert_close(part, expected)
    shift = v @ model.lm_head.weight.T
    moved = whole - logits(model, tokens)
    torch.testing.assert_close(moved[:, [0, 4]], shift.expand(2, 2, -1), atol=1e-5, rtol=1e-5)
    assert not bool(moved[:, [1, 2, 3, 5]].any())


# When: schedules against generation by hand, a token at a time and without a cache


def slowly(model, prompt, factor, v, steps):
    """Greedy tokens; at each step the whole sequence runs anew, steered token by token as the definition says."""
    tokens, length = prompt.clone(), prompt.shape[1]
    for _ in range(steps):
        strengths = torch.tensor([factor(max(0, t - length + 1)) for t in range(tokens.shape[1])])

        def change(x, strengths=strengths):
            return x + strengths[None, :, None] * v

        tokens = torch.cat([tokens, by_hand(model, tokens, change)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, length:]


class Jump(StrengthSchedule):
    """Somebody's own."""

    def factor(self, steps):
        return (steps == 2).float() * 3


SCHEDULES = {
    "constant": (None, lambda s: 1.0),
    "decay": (LinearDecay(3), lambda s: max(0.0, 1 - s / 3)),
    "decay to half": (LinearDecay(4, end=0.5), lambda s: 1 - 0.5 * min(s, 4) / 4),
    "warm-up": (WarmUp(3, start=0.1), lambda s: 0.1 + 0.9 * min(s, 3) / 3),
    "list": ([2.0, 0.0, 1.0], lambda s: [2.0, 0.0, 1.0][min(s, 2)]),
    "function": (lambda steps: 1.0 / (1 + steps.clamp(min=0)), lambda s: 1.0 / (1 + s)),
    "own": (Jump(), lambda s: 3.0 * (s == 2)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cache", [True, False])
def test_schedules_against_a_slow_loop(model, name, cache):
    schedule, factor = SCHEDULES[name]
    prompt, v = ids(1, 5, seed=3), vector(4, size=3)
    steer = AddDirection(v, site=SITE, strength=2.0, schedule=schedule)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": cache}
    with steer.attach(model) as attachment:
        if not cache:
            attachment.prompt_lengths = torch.tensor([5])
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[:, 5:]
    assert found.tolist() == slowly(model, prompt, factor, 2.0 * v, 6).tolist()


def test_schedules_matter(model):
    prompt, v = ids(1, 5, seed=3), vector(4, size=3)
    texts = {
        name: tuple(slowly(model, prompt, factor, 2.0 * v, 6)[0].tolist()) for name, (_, factor) in SCHEDULES.items()
    }
    assert len(set(texts.values())) >= 5, texts


def test_a_schedule_times_strengths_times_positions(model):
    prompt = ids(3, 4)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    steer = AddDirection(
        vector(size=4), site=SITE, strength=[0.0, 1.0, 2.0], positions=GenerationSteps(1, 3), schedule=[5.0, 1.0, 0.5]
    )
    seen = ActivationCapture([SITE], keep="all")
    plain = ActivationCapture([SITE], keep="all")
    with Compose(plain, steer, seen).attach(model):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    moved = [
        (a - b).norm(dim=-1) / vector(size=4).norm()
        for a, b in zip(seen.history[SITE], plain.history[SITE], strict=True)
    ]
    assert not bool(moved[0].any())
    torch.testing.assert_close(moved[1][:, 0], torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(moved[2][:, 0], torch.tensor([0.0, 0.5, 1.0]))
    assert not bool(moved[3].any())


# Training


@every_member
def test_gradients_reach_the_tensors_and_the_strengths(name, model):
    steer = members()[name]
    steer.tensors = {
        site: tuple(torch.nn.Parameter(t.clone()) for t in tensors) for site, tensors in steer.tensors.items()
    }
    steer.strength = torch.ones(2, requires_grad=True)
    with steer.attach(model):
        model(input_ids=ids(2), labels=ids(2)).loss.backward()
    gradients = [t.grad for tensors in steer.tensors.values() for t in tensors] + [steer.strength.grad]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients), [g is None for g in gradients]
    model.zero_grad()


def test_a_parameter_stays_the_users_and_is_trained(model):
    direction = torch.nn.Parameter(0.1 * vector())
    steer = AddDirection(direction, site=SITE)
    assert steer.tensors[SITE][0] is direction
    assert steer.describe()["trained"]
    optimiser, losses = torch.optim.Adam([direction], lr=0.1), []
    tokens = ids(2, 8)
    for _ in range(15):
        with steer.attach(model):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.zero_grad()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, v = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    rows = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(make):
        return lambda tensor, y: one(make(tensor), y)

    for make, start in (
        (lambda d: AddDirection(d, site=SITE, strength=0.7, keep_norm=True), v.clone().requires_grad_()),
        (lambda d: ProjectOut(d, site=SITE, strength=0.7), rows),
        (lambda d: ClampDirection(d, to=0.3, site=SITE, strength=0.7), v.clone().requires_grad_()),
    ):
        assert torch.autograd.gradcheck(run(make), (start, x.clone().requires_grad_()))


@every_member
def test_what_was_used_without_gradients_can_be_used_with_them(name, model):
    steer = members()[name]
    with steer.attach(model):
        with torch.inference_mode():
            model(input_ids=ids())
        model(input_ids=ids(), labels=ids()).loss.backward()
    model.zero_grad()


@every_member
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_and_are_near_float32(name, dtype):
    x = torch.randn(2, 3, WIDTH)
    exact = one(members(strength=[1.0, 0.7])[name], x.to(dtype).float())
    found = one(members(strength=[1.0, 0.7])[name], x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=1e-2)


@every_member
def test_autocast_does_not_round_the_steering(name):
    x = torch.randn(2, 3, WIDTH)
    exact = one(members(strength=[1.0, 0.7])[name], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(one(members(strength=[1.0, 0.7])[name], x), exact)


@every_member
def test_nothing_is_changed_in_place(name):
    steer, x = members()[name], torch.randn(2, 3, WIDTH)
    before, tensors = x.clone(), copy.deepcopy(steer.tensors)
    one(steer, x)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for site in tensors for a, b in zip(steer.tensors[site], tensors[site], strict=True))


def test_later_changes_of_the_given_tensor_do_not_reach_it():
    v = vector()
    steer, x = AddDirection(v, site=SITE), torch.zeros(1, 1, WIDTH)
    v.zero_()
    assert bool(one(steer, x).any())


# Records


@every_member
def test_descriptions_are_plain_and_pickles_act_alike(name):
    steer = members(strength=[1.0, 2.0], positions=~Prompt(), schedule=LinearDecay(4))[name]
    described = steer.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["positions"] == {"kind": "Not", "inner": {"kind": "Prompt"}}
    assert (described["strength"], described["schedule"]["kind"]) == ([1.0, 2.0], "LinearDecay")
    x = torch.randn(2, 3, WIDTH)
    context = {"known_prompt_lengths": torch.tensor([1, 2])}
    for twin in (pickle.loads(pickle.dumps(steer)), copy.deepcopy(steer)):  # noqa: S301
        assert twin.describe() == described
        assert torch.equal(one(twin, x, **context), one(steer, x, **context))


def test_a_description_tells_directions_apart():
    one_way, other = (AddDirection(vector(k), site=SITE).describe() for k in (0, 1))
    assert one_way["sha256"] != other["sha256"]
    assert AddDirection(vector(0), site=SITE).describe() == one_way


def test_a_function_as_schedule_is_named():
    def cooling(steps):
        return torch.exp(-steps.float())

    assert AddDirection(vector(), site=SITE, schedule=cooling).describe()["schedule"]["name"].endswith("cooling")


def test_the_first_snippet_of_the_guide(tmp_path, model):
    tokenizer = byte_tokenizer()
    path = SteeringVector({Site("resid_post", 2): vector()}, concept="kindness").save(tmp_path / "kindness.safetensors")
    steer = AddDirection.load(path, site=Site("resid_post", 2), strength=4.0, positions=Last())
    batch = tokenizer(["hello", "hi"], return_tensors="pt", padding=True)
    with steer.attach(model):
        found = model(**batch).logits
    torch.testing.assert_close(found[:, :-1], model(**batch).logits[:, :-1])
    assert not torch.equal(found[:, -1], model(**batch).logits[:, -1])
