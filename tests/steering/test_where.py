"""Gates: the tokens they choose against thresholds applied by hand, wherever they are asked, and what they refuse."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import dataclass

import pytest
import torch

from lightning_interp import (
    ActivationCapture,
    All,
    Compose,
    FromBatch,
    Generated,
    Last,
    Positions,
    Prompt,
    Site,
    StepContext,
    Tokens,
)
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.errors import DataError, IncompatibleModelError, PositionError, RecipeError, SiteError
from lightning_interp.steering import (
    AddDirection,
    ClampDirection,
    EntropyGate,
    Gate,
    PairMassGate,
    ProbeGate,
    SteeringVector,
    describe_positions,
    model_fingerprint,
)
from lightning_interp.steering.activation.selectors import bind_positions, same_at_every_site
from lightning_interp.steering.activation.where import spread_columns
from lightning_interp.steering.concepts.probes import ConceptProbe
from lightning_interp.testing import byte_tokenizer, tiny_model

WIDTH = 32
SITE, LATER, HEAD = Site("resid_post", 1), Site("resid_post", 2), Site("unembed_in")
TOKENS = torch.randint(5, 250, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])


def vector(k=0, size=1.0):
    return size * torch.randn(WIDTH, generator=torch.Generator().manual_seed(k))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def run(model, **more):
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=MASK, **more)


def activations(model, *sites, **more):
    seen = ActivationCapture(sites)
    with seen.attach(model):
        output = run(model, **more)
    return *(seen.activations[site] for site in sites), output.logits


def moved_by(model, steer, site, **more):
    """Tokens whose activation at the steered site changed."""
    before, after = ActivationCapture([site]), ActivationCapture([site])
    with Compose(before, steer, after).attach(model):
        run(model, **more)
    return (before.activations[site] != after.activations[site]).any(dim=-1)


def chosen_by(model, gate, site=SITE, **more):
    return moved_by(model, AddDirection(vector(9), site=site, positions=gate), site, **more)


def between(values):
    """A threshold that no real token's value comes near."""
    ordered = values[MASK.bool()].sort().values
    half = len(ordered) // 2
    return float(ordered[half - 1 : half + 1].mean())


# What they choose


@pytest.mark.parametrize(("above", "below"), [(0.5, None), (None, -0.5), (-4.0, 4.0)])
def test_probe_gate_is_a_threshold_on_real_tokens(model, above, below):
    (x, _) = activations(model, SITE)
    value = x @ vector(3) + 0.25
    expected = MASK.bool() & (value > (above if above is not None else -math.inf))
    expected &= value < (below if below is not None else math.inf)
    assert 0 < int(expected.sum()) < int(MASK.sum())
    gate = ProbeGate(vector(3), offset=0.25, above=above, below=below)
    assert torch.equal(chosen_by(model, gate), expected)
    assert torch.equal(chosen_by(model, ~gate), MASK.bool() & ~expected)


def test_gates_combine_with_other_selectors(model):
    (x, _) = activations(model, SITE)
    gate = ProbeGate(vector(3), above=0.0)
    hit, last = MASK.bool() & (x @ vector(3) > 0), torch.zeros(3, 7, dtype=torch.bool)
    last[:, -1] = True
    assert torch.equal(chosen_by(model, gate & Last()), hit & last)
    assert torch.equal(chosen_by(model, gate | Last()), hit | last)
    assert torch.equal(chosen_by(model, ~(gate | Last())), MASK.bool() & ~hit & ~last)


def test_entropy_gate_is_a_threshold_on_the_models_own_distribution():
    for family in ("llama", "gemma2"):  # one that caps its logits, too
        model = tiny_model(family)
        p = run(model).logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        middle = between(entropy)
        expected = MASK.bool() & (entropy > middle)
        assert torch.equal(chosen_by(model, EntropyGate(above=middle), HEAD), expected)
        assert torch.equal(chosen_by(model, EntropyGate(below=middle), HEAD), MASK.bool() & (entropy < middle))


def test_pair_mass_gate_counts_each_token_once(model):
    p = run(model).logits.softmax(-1)
    pairs = [(5, 9), (6, 9), (100, 101)]
    mass = p[..., [5, 6, 9, 100, 101]].sum(-1)
    middle = between(mass)
    expected = MASK.bool() & (mass > middle)
    assert torch.equal(chosen_by(model, PairMassGate(pairs, above=middle), HEAD), expected)
    assert torch.equal(chosen_by(model, PairMassGate(pairs, below=middle), HEAD), MASK.bool() & (mass < middle))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 6])])
def test_gates_fit_the_columns_that_the_head_sees(model, kept):
    gate = EntropyGate(above=float(0.98 * torch.tensor(261.0).log()))
    whole = chosen_by(model, gate | Last(), HEAD)
    part = chosen_by(model, gate | Last(), HEAD, logits_to_keep=kept)
    assert torch.equal(part, whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:])


def test_spreading_columns_undoes_fitting():
    for kept, columns in ((None, 4), (2, 2), (torch.tensor([0, 3]), 2), (torch.tensor([2, 0, 1, 3]), 4)):
        step = StepContext(2, 4, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), kept=kept)
        seen = torch.rand(2, columns, generator=torch.Generator().manual_seed(0)) > 0.4
        whole = spread_columns(step, seen)
        valid = step.fit(step.valid, columns)
        assert torch.equal(step.fit(whole, columns), seen & valid)
        assert int(whole.sum()) == int((seen & valid).sum())


def test_a_gate_with_a_site_reads_there(model):
    (early, late, _) = activations(model, SITE, LATER)
    gate = ProbeGate(vector(3), above=0.1, site="resid_post.1")
    expected = MASK.bool() & (early @ vector(3) > 0.1)
    assert torch.equal(chosen_by(model, gate, LATER), expected)
    assert not torch.equal(expected, MASK.bool() & (late @ vector(3) > 0.1))
    # At its own site it reads what comes in, however often something is added there.
    twice = Compose(*(AddDirection(vector(3, 50), site=SITE, positions=gate) for _ in range(2)))
    with twice.attach(model):
        run(model)


def test_a_gate_of_each_layer_reads_its_own_layer(model):
    gate = ProbeGate(vector(3), above=0.0)
    (first, _) = activations(model, SITE)
    steer = AddDirection(vector(9), site=[SITE, LATER], positions=gate)
    before, after = ActivationCapture([SITE, LATER]), ActivationCapture([SITE, LATER])
    with Compose(before, steer, after).attach(model):
        run(model)
    for site in (SITE, LATER):
        x = before.activations[site]
        moved = (x != after.activations[site]).any(-1)
        assert torch.equal(moved, MASK.bool() & (x @ vector(3) > 0)), site
    assert torch.equal(before.activations[SITE], first)


def test_a_held_decision_is_that_of_the_prompts_last_token(model):
    prompts, tokenizer = ["ab", "abcde", "xyz", "hi there"], byte_tokenizer()
    batch = dict(tokenizer(prompts, return_tensors="pt", padding=True))
    seen = ActivationCapture([SITE])
    with seen.attach(model), torch.no_grad():
        model(**batch)
    value = (seen.activations[SITE] @ vector(3))[:, -1]
    middle = float(value.median())
    steer = AddDirection(
        vector(9, 5), site=LATER, positions=ProbeGate(vector(3), above=middle, site=str(SITE), hold=True)
    )
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before, after = ActivationCapture([LATER], keep="all"), ActivationCapture([LATER], keep="all")
    with Compose(before, steer, after).attach(model):
        written = model.generate(**batch, **how)
    for pass_, (a, b) in enumerate(zip(before.history[LATER], after.history[LATER], strict=True)):
        moved = (a != b).any(-1)
        expected = (value > middle)[:, None] & (batch["attention_mask"].bool() if pass_ == 0 else True)
        assert torch.equal(moved, expected), pass_
    with steer.attach(model):
        beams = model.generate(**batch, **{**how, "num_beams": 2})
    plain = model.generate(**batch, **{**how, "num_beams": 2})
    assert [torch.equal(a, b) for a, b in zip(beams, plain, strict=True)] == (value <= middle).tolist()
    # The same without a cache, where the caller says where the prompt ends.
    with steer.attach(model) as attachment:
        attachment.prompt_lengths = batch["attention_mask"].sum(1)
        assert torch.equal(model.generate(**batch, **how, use_cache=False), written)


def test_gated_generation_by_hand(model):
    prompt, v = TOKENS[:1], vector(9, 4)
    gate = ProbeGate(vector(3), above=0.0)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with AddDirection(v, site=SITE, positions=gate & Generated()).attach(model):
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, 7:]
    tokens = prompt.clone()
    for _ in range(6):

        def change(_, __, x):
            chosen = (x @ vector(3) > 0) & (torch.arange(x.shape[1]) >= 7)
            return x + chosen[..., None] * v

        handle = model.model.layers[1].register_forward_hook(change)
        with torch.no_grad():
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        handle.remove()
    assert found.tolist() == tokens[0, 7:].tolist()


def test_a_gate_looks_at_bf16_in_float32():
    x = torch.full((1, 1, 512), 1.0, dtype=torch.bfloat16)
    probe = torch.full((512,), 2.0**-9)
    probe[0] += 2.0**-9  # 1 + 2^-9 in all, which bfloat16 would round to 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert StepContext(1, 1).choose(ProbeGate(probe, above=1.0), x).item()


# Where directions come from, and going to and from plain data


def test_a_probe_a_vector_and_their_files(tmp_path):
    probe, steering = ConceptProbe(vector(3), bias=5.0), SteeringVector({SITE: vector(3), LATER: vector(4)})
    files = {"probe": probe.save(tmp_path / "probe.safetensors"), "vector": steering.save(tmp_path / "v.safetensors")}
    plain = ProbeGate(vector(3), above=0.0)
    for given, more in ((probe, {}), (files["probe"], {}), (str(files["probe"]), {}), (vector(3).tolist(), {})):
        assert ProbeGate(given, above=0.0, **more) == plain
    for given in (steering, files["vector"]):
        assert torch.equal(ProbeGate(given, above=0.0, site="resid_post.2").found.direction, vector(4))
    with pytest.raises(SiteError, match=r"resid_post.1, resid_post.2\. Say which"):
        ProbeGate(steering, above=0.0)


@pytest.mark.parametrize(
    "gate",
    [
        ProbeGate(vector(3), above=0.5, offset=1.0),
        ProbeGate(vector(3), above=-1.0, below=2.0, site="resid_post.1", hold=True),
        EntropyGate(above=0.1),
        PairMassGate([(1, 2), (3, 4)], below=0.5),
        Generated(0, 8) & ~ProbeGate(vector(3), below=0.0) | Last(),
    ],
)
def test_gates_round_trip_through_plain_data(gate):
    again = Positions.from_dict(json.loads(json.dumps(gate.to_dict())))
    assert again == gate
    assert hash(again) == hash(gate)
    for twin in (pickle.loads(pickle.dumps(gate)), copy.deepcopy(gate)):  # noqa: S301
        assert twin == gate
    x = torch.randn(1, 4, WIDTH)
    if isinstance(gate, ProbeGate) and gate.site is None:
        assert torch.equal(StepContext(1, 4).choose(again, x), StepContext(1, 4).choose(gate, x))


def test_a_direction_from_a_file_is_kept_as_its_file_and_hash(tmp_path):
    path = SteeringVector({SITE: vector(3)}).save(tmp_path / "v.safetensors")
    data = ProbeGate(path, above=0.0).to_dict()
    assert data["probe"] == str(path)
    assert Positions.from_dict(data) == ProbeGate(vector(3), above=0.0)
    SteeringVector({SITE: vector(4)}).save(path)
    with pytest.raises(PositionError, match=data["sha256"][:12]):
        Positions.from_dict(data)


def test_gates_differ_by_their_numbers():
    one = ProbeGate(vector(3), above=0.0)
    others = [ProbeGate(vector(4), above=0.0), ProbeGate(vector(3), above=0.1), ProbeGate(vector(3), below=0.0)]
    others += [ProbeGate(vector(3), above=0.0, offset=1.0), ProbeGate(vector(3), above=0.0, site="resid_post.1")]
    others += [EntropyGate(above=0.0), PairMassGate([(1, 2)], above=0.0), All()]
    assert all(one != other for other in others)
    assert len({one, ProbeGate(vector(3), above=0.0), *others}) == len(others) + 1


def test_descriptions_are_short_and_plain():
    described = describe_positions(Generated() & ProbeGate(torch.ones(4000), above=0.5))
    assert json.loads(json.dumps(described)) == described
    assert described["right"]["probe"] == "4000 values"
    assert len(described["right"]["sha256"]) == 64


@dataclass(frozen=True)
class Odd(Positions):
    """A user's own: every other column, and a field that JSON does not know."""

    extra: object = None

    def mask(self, step):
        return step.valid & (step.columns % 2 == 1)


def test_a_users_own_selector(model):
    assert chosen_by(model, Odd(object())).tolist() == (MASK.bool() & (torch.arange(7) % 2 == 1)).tolist()
    assert describe_positions(Odd(extra=object()))["kind"] == "Odd"
    assert not same_at_every_site(Odd() & All())
    assert same_at_every_site(Prompt() & ~Tokens((3,)) | FromBatch("x"))
    assert not same_at_every_site(Last() | ProbeGate(vector(), above=0.0))


class Long(Gate):
    """A user's own gate."""

    def values(self, x):
        return x.norm(dim=-1)


def test_a_users_own_gate(model):
    (x, _) = activations(model, SITE)
    middle = between(x.norm(dim=-1))
    assert torch.equal(chosen_by(model, Long(above=middle)), MASK.bool() & (x.norm(dim=-1) > middle))


# What is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ProbeGate(vector()), PositionError, "has no threshold"),
        (lambda: EntropyGate(), PositionError, r"EntropyGate\(above=None, below=None\) has no threshold"),
        (lambda: EntropyGate(above=float("nan")), PositionError, "above=nan"),
        (lambda: EntropyGate(above=2.0, below=1.0), PositionError, "above 2.0 and below 1.0"),
        (lambda: ProbeGate(torch.zeros(4), above=0.0), RecipeError, "is zero in all its 4 numbers"),
        (lambda: ProbeGate(torch.tensor([float("nan")]), above=0.0), RecipeError, "holds nan"),
        (lambda: ProbeGate(torch.ones(2, 2), above=0.0), RecipeError, r"shape \[2, 2\]"),
        (lambda: ProbeGate({"a": 1}, above=0.0), RecipeError, r"\{'a': 1\} is no direction"),
        (lambda: ProbeGate("gone.safetensors", above=0.0), DataError, "'gone.safetensors'"),
        (lambda: ProbeGate(vector(), above=0.0, hold=True), PositionError, "names no site"),
        (lambda: ProbeGate(vector(), above=0.0, site="resid_posr.1"), SiteError, "'resid_posr'"),
        (lambda: ProbeGate(vector(), above=0.0, sha256="ab" * 32), PositionError, "abababababab was recorded"),
        (lambda: PairMassGate([], above=0.5), PositionError, "of 0 pairs"),
        (lambda: PairMassGate([(1, 2)], above=1.5), PositionError, "above=1.5"),
        (lambda: PairMassGate([1, 2], above=0.5), PositionError, r"\[1, 2\]"),
        (lambda: PairMassGate([("a", "b")], above=0.5), PositionError, r"\('a', 'b'\)"),
    ],
)
def test_wrong_gates_are_refused_when_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("gate", "site", "error", "message"),
    [
        (EntropyGate(above=1.0), SITE, SiteError, r"which resid_post\.1 does not tell"),
        (~EntropyGate(above=1.0) & Last(), "logits", SiteError, "which logits does not tell"),
        (PairMassGate([(1, 2)], above=0.5), "final_norm", SiteError, "which final_norm does not tell"),
        (PairMassGate([(1, 999)], above=0.5), HEAD, PositionError, "tokens 1 to 999, but LlamaForCausalLM has 261"),
        (ProbeGate(torch.ones(31), above=0.0), SITE, IncompatibleModelError, "width 31, but resid_post.1"),
        (ProbeGate(vector(), above=0.0, site="resid_post.7"), SITE, SiteError, "got layer 7"),
        (
            ProbeGate(SteeringVector({SITE: vector()}, fingerprint="ab" * 32), above=0.0),
            SITE,
            IncompatibleModelError,
            "fingerprint abababababab",
        ),
    ],
)
def test_gates_that_do_not_fit_are_refused_at_attach(model, gate, site, error, message):
    width = 261 if site == "logits" else WIDTH
    before = hooks(model)
    with pytest.raises(error, match=message):
        AddDirection(torch.ones(width), site=site, positions=gate).attach(model)
    assert hooks(model) == before


def test_a_vector_of_this_model_is_taken(model):
    steering = SteeringVector({SITE: vector()}, fingerprint=model_fingerprint(model))
    chosen_by(model, ProbeGate(steering, above=0.0))


def test_a_gate_that_would_read_too_late_says_so(model):
    steer = AddDirection(vector(), site=SITE, positions=ProbeGate(vector(), above=0.0, site="resid_post.2"))
    with steer.attach(model), pytest.raises(PositionError, match=r"site='resid_post.2'.*before that site ran"):
        run(model)


def test_a_held_gate_needs_to_see_the_prompt(model):
    gate = ProbeGate(vector(), above=0.0, site="resid_post.0", hold=True)
    with torch.no_grad():
        cache = cache_of(model(input_ids=TOKENS, use_cache=True))
    with (
        AddDirection(vector(), site=SITE, positions=gate).attach(model),
        pytest.raises(
            PositionError, match=r"ProbeGate\(.*hold=True\) chooses tokens that are cached already: 7 columns"
        ),
    ):
        model(input_ids=TOKENS[:, :1], **cache_argument(model, cache))
    with pytest.raises(PositionError, match=r"prompt of this decoding step \(3 rows\) was not seen"):
        gate.mask(StepContext(3, 1, 7))


def test_gates_are_asked_at_a_site_and_head_gates_when_attached():
    step, x = StepContext(1, 2), torch.ones(1, 2, WIDTH)
    with pytest.raises(PositionError, match=r"ProbeGate\(above=0.0\) reads an activation"):
        ProbeGate(vector(), above=0.0).mask(step)
    with pytest.raises(PositionError, match=r"EntropyGate\(above=1.0, below=None\) needs the model's head"):
        step.choose(EntropyGate(above=1.0), x)
    with pytest.raises(IncompatibleModelError, match="width 3, but the activation has 32"):
        step.choose(ProbeGate(torch.ones(3), above=0.0), x)


def test_binding_leaves_what_holds_no_gate_alone(model):
    where = Prompt() & ~Last()
    with AddDirection(vector(), site=SITE).attach(model) as attachment:
        assert bind_positions(where, attachment, [SITE]) is where
        bound = bind_positions(EntropyGate(above=0.1) | Last(), attachment, [HEAD])
    assert bound == EntropyGate(above=0.1) | Last()
    assert bound.left.geometry.vocabulary == 261


def test_a_trained_clamp_behind_a_gate_replays_under_gradient_checkpointing(model):
    net = tiny_model("llama").train()
    steer = ClampDirection(vector(), to=1.0, site=LATER, positions=ProbeGate(vector(3), above=0.0, site=str(SITE)))
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)({"use_reentrant": False})
        net.zero_grad()
        with steer.attach(net):
            net(input_ids=TOKENS, labels=TOKENS).loss.backward()
        losses.append({name: p.grad.clone() for name, p in net.named_parameters()})
    for name, gradient in losses[0].items():
        torch.testing.assert_close(losses[1][name], gradient)
