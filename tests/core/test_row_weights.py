"""Row weights against each row run alone: batches of several adapters, several holders of one module, dropout."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import lru_cache
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_interp.core.hooks.intervention import Compose
from lightning_interp.core.weights.counted_dropout import CountedDropout, kept
from lightning_interp.core.weights.holders import RowSource
from lightning_interp.core.weights.row_weights import RowWeights
from lightning_interp.core.weights.sources import AdapterSource, ModelSource, make_sources
from lightning_interp.errors import IncompatibleModelError, PositionError, RecipeError
from lightning_interp.testing import tiny_model, tiny_pair

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
RANKS = {"first": 2, "second": 4, "third": 1}
T = 7
TWO = {"num_hidden_layers": 2}


def with_adapters(names=tuple(RANKS), **options):
    return copy.deepcopy(built(names, tuple(options.items())))


@lru_cache
def built(names, options):
    model = tiny_model("llama", **TWO)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in names:
            settings = {"r": RANKS[name], "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
            inject_adapter_in_model(LoraConfig(**settings | dict(options)), model, adapter_name=name)
    activate(model, names[0])
    return model.double().eval()


def doubles(family, **options):
    return [model.double() for model in tiny_pair(family, **options)]


def close(actual, expected, tolerance=1e-10):
    assert float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)


def activate(model, *names):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter = list(names)


def prompts(rows, seed=3):
    return torch.randint(5, 261, (rows, T), generator=torch.Generator().manual_seed(seed))


def run(model, ids):
    return model(ids).logits


@pytest.fixture(scope="module")
def model():
    return with_adapters()


# Rows that belong to different adapters.


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if ".lora_" in name}


DROPPING = {"use_rslora": True, "lora_dropout": 0.4}


@pytest.mark.parametrize(
    ("execution", "options"),
    [("auto", DROPPING), ("overwrite", {}), ("partition", {"use_dora": True}), ("dense", DROPPING)],
)
def test_a_batch_of_adapters_is_each_row_with_its_adapter_alone(execution, options):
    model, ids, codes = with_adapters(**options).train(), prompts(4), [2, 1, 0, 2]
    before, state, random = run(model.eval(), ids), state_of(model), torch.get_rng_state()
    model.train()
    weight = torch.randn(4, T, 1, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    rows = RowWeights({n: n for n in RANKS}, torch.tensor(codes), execution=execution)
    with rows.attach(model):
        logits = run(model, ids)
        (logits * weight).sum().backward()
    together, logits = gradients(model), logits.detach()
    assert torch.equal(torch.get_rng_state(), random)
    expected = {}
    for i, code in enumerate(codes):
        model.zero_grad()
        name = list(RANKS)[max(code - 1, 0)]
        alone = RowWeights(name, torch.tensor([min(code, 1)]))
        alone.dropout = CountedDropout(step=0, row_numbers=torch.tensor([i]))
        activate(model, name)
        with alone.attach(model):
            row = run(model, ids[i : i + 1])
            if code:  # the recipient has nothing that learns
                (row * weight[i : i + 1]).sum().backward()
        close(logits[i : i + 1], row.detach())
        for name, grad in gradients(model).items():
            if grad is not None:
                expected[name] = expected.get(name, 0) + grad
    assert {name for name, grad in together.items() if grad is not None} == set(expected)
    assert not any(".third." in name for name in expected)
    for name, grad in expected.items():
        close(together[name], grad)
    activate(model, "first")
    assert hook_count(model) == 0
    assert same_state(model, state)
    assert torch.equal(run(model.eval(), ids), before)


def test_a_row_with_one_adapter_is_peft_with_that_adapter(model):
    ids = prompts(3)
    with RowWeights({n: n for n in RANKS}, torch.tensor([3, 1, 2])).attach(model), torch.no_grad():
        found = run(model, ids)
    for i, name in enumerate(["third", "first", "second"]):
        activate(model, name)
        with torch.no_grad():
            close(found[i], run(model, ids)[i])
    activate(model, "first")


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (None, r"RowWeights\('donor'\) has no codes for this pass"),
        (torch.tensor([1, 0]), "are given for 2 rows, but the batch has 3"),
        (torch.zeros(3, 5, dtype=torch.long), r"are \(3, 5\), but the pass has 3 rows of 7 tokens"),
        (torch.tensor([0, 2, 1]), r"go from 0 to 2; expected 0 \(recipient\) to 1"),
        (torch.tensor([0, -1, 1]), r"go from -1 to 1; expected"),
    ],
)
def test_codes_that_do_not_fit(codes, match, model):
    rows = RowWeights("first")
    rows.codes = codes
    with rows.attach(model), pytest.raises(PositionError, match=match):
        run(model, prompts(3))
    assert hook_count(model) == 0


def test_codes_of_a_function_and_of_beams(model):
    ids = prompts(2).repeat_interleave(2, dim=0)
    with torch.no_grad():
        with RowWeights("first", torch.tensor([0, 1])).attach(model):
            beams = run(model, ids)
        halves = torch.tensor([0, 0, 1, 1])[:, None].expand(-1, T)
        with RowWeights("first", lambda step: halves).attach(model):
            assert torch.equal(run(model, ids), beams)


def test_it_acts_at_no_site(model):
    rows = RowWeights("first")
    assert rows.sites(None) == ()
    assert rows.transform(None, "x", None) == "x"


# Several holders.

CODES = st.lists(st.integers(0, 3), min_size=2 * T, max_size=2 * T).map(lambda c: torch.tensor(c).view(2, T))


def held(model, *interventions, ids):
    with ExitStack() as stack, torch.no_grad():
        for intervention in interventions:
            stack.enter_context(intervention.attach(model))
        return run(model, ids)


@settings(max_examples=6)
@given(CODES, st.permutations(list(RANKS)))
def test_disjoint_holders_are_one_holder_in_any_order(model, codes, order):
    ids = prompts(2)
    whole = held(model, RowWeights({n: n for n in RANKS}, codes), ids=ids)
    parts = {n: RowWeights(n, (codes == k).long()) for k, n in enumerate(RANKS, start=1)}
    with torch.no_grad(), Compose(*(parts[n] for n in order)).attach(model):
        close(run(model, ids), whole)


PLACE = "model.layers.1.mlp.up_proj"
MIXED = torch.arange(2 * T).view(2, T) % 2


def switches(model):
    return [module.disable_adapters for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_pass_that_fails_leaves_the_adapter_on(model, mixed):
    plain, layer = run(model, ids := prompts(2)), model.get_submodule(PLACE)
    broken = layer.base_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with RowWeights("first", MIXED if mixed else torch.zeros_like(MIXED)).attach(model):
        with pytest.raises(ZeroDivisionError):
            run(model, ids)
        assert not any(switches(model))
        broken.remove()
        assert not torch.allclose(run(model, ids), plain)
    assert not any(switches(model))
    assert torch.equal(run(model, ids), plain)


def test_a_pass_that_is_interrupted_leaves_the_adapter_on(model):
    plain, layer = run(model, ids := prompts(2)), model.get_submodule(PLACE)

    def interrupt(*_):
        raise KeyboardInterrupt

    broken = layer.base_layer.register_forward_pre_hook(interrupt)
    with RowWeights("first", MIXED).attach(model), pytest.raises(KeyboardInterrupt):
        run(model, ids)
    broken.remove()
    assert not any(switches(model))
    assert torch.equal(run(model, ids), plain)


def test_a_pass_over_some_rows_calls_each_base_once_on_all_of_them(model):
    """No module runs on rows that it is not needed for, and none twice."""
    shapes = []
    base = model.get_submodule(PLACE).base_layer
    seen = base.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with RowWeights("first", MIXED).attach(model):
        run(model, prompts(2))
    seen.remove()
    assert shapes == [(2, T, base.in_features)]


@pytest.mark.parametrize("execution", ["auto", "partition", "dense"])
def test_models_and_adapters_side_by_side(execution):
    """A model's rows, an adapter's rows, and neither's, against one holder of both."""
    base, model = tiny_model("llama", **TWO).double(), with_adapters(("first",))
    _, donor = doubles("llama", **TWO)
    codes, ids = torch.arange(2 * T).view(2, T) % 3, prompts(2)
    adapter = RowWeights("first", (codes == 1).long(), execution=execution)
    other = RowWeights(donor, (codes == 2).long())
    expected = held(model, RowWeights({"a": "first", "m": donor}, codes), ids=ids)
    for order in permutations([adapter, other]):
        close(held(model, *order, ids=ids), expected)
    nothing = torch.zeros(2, T, dtype=torch.long)
    both = (RowWeights("first", nothing), RowWeights(donor, nothing))
    assert torch.equal(held(model, *both, ids=ids), held(base, ids=ids))


def test_each_holder_can_leave_first(model):
    ids, codes = prompts(2), torch.arange(2 * T).view(2, T) % 4
    plain, state = held(model, ids=ids), state_of(model)

    def parts():
        return {n: RowWeights(n, (codes == k).long()) for k, n in enumerate(RANKS, start=1)}

    def attach_all():
        made = parts()
        opened = Compose(made["first"]).attach(model)
        return {"first": opened, **{n: made[n].attach(model) for n in list(RANKS)[1:]}}

    alone = {}
    for name in RANKS:
        activate(model, name)
        alone[name] = held(model, parts()[name], ids=ids)
    activate(model, "first")
    names = [*RANKS]
    for order in (names[i:] + names[:i] for i in range(3)):  # each of them first, second and last
        attachments = attach_all()
        for name in order[:2]:
            attachments[name].remove()
        with torch.no_grad():
            close(run(model, ids), alone[order[2]])
        attachments[order[2]].remove()
        attachments[order[0]].remove()
        assert hook_count(model) == 0
    assert same_state(model, state)
    assert torch.equal(held(model, ids=ids), plain)


def test_a_holder_that_fails_to_come_leaves_the_first_as_it_was(model):
    ids, ones = prompts(2), torch.ones(2, dtype=torch.long)
    with RowWeights("first", ones).attach(model), torch.no_grad():
        before, hooks = run(model, ids), hook_count(model)
        activate(model, "first", "third")
        with pytest.raises(IncompatibleModelError, match=r"\['first', 'third'\], expected only 'first' and 'second'"):
            RowWeights("second", ones).attach(model)
        activate(model, "first")
        assert hook_count(model) == hooks
        assert torch.equal(run(model, ids), before)

        class Late(RowWeights):
            def install(self, attachment):
                super().install(attachment)
                raise RuntimeError("late")

        with pytest.raises(RuntimeError, match="late"):
            Late("second", ones).attach(model)
        assert hook_count(model) == hooks
        assert torch.equal(run(model, ids), before)
    assert hook_count(model) == 0


def test_one_row_for_two_sources(model):
    ids, codes = prompts(2), torch.zeros(2, T, dtype=torch.long)
    codes[1, 2:4] = 1
    one, two = RowWeights({"a": "first"}, codes), RowWeights({"b": "second"}, codes)
    match = (
        r"Row 1, token 2 of model.layers.0.self_attn.q_proj .*RowWeights\('a'\) claims it for 'a' and "
        r"RowWeights\('b'\) claims it for 'b'"
    )
    with Compose(one, two).attach(model):
        with pytest.raises(RecipeError, match=match):
            run(model, ids)
        two.codes = codes.roll(1, dims=0)
        run(model, ids)
        three = RowWeights({"c": "third"}, codes.roll(2, dims=1))
        with three.attach(model), torch.no_grad():
            run(model, ids)
            three.codes = codes.roll(1, dims=0)
            with pytest.raises(RecipeError, match=r"Row 0, token 2 .*'b'\) claims .*'c'\) claims it for 'c'"):
                run(model, ids)


def test_one_row_for_equal_sources(model):
    ids, codes = prompts(2), torch.arange(2 * T).view(2, T) % 2
    _, donor = doubles("llama", **TWO)
    for source in ("first", donor):
        alone = held(model, RowWeights(source, codes), ids=ids)
        twice = held(model, RowWeights(source, codes), RowWeights(source, codes), ids=ids)
        assert torch.equal(twice, alone)
    half = [RowWeights([RowSource(AdapterSource("first"), 0.5, "half")], codes) for _ in range(2)]
    assert torch.equal(held(model, *half, ids=ids), held(model, half[0], ids=ids))
    with pytest.raises(RecipeError, match=r"claims it for 'half' and .*claims it for 'donor'"):
        held(model, half[0], RowWeights("first", codes), ids=ids)


@pytest.mark.parametrize("execution", ["auto", "dense"])
def test_holders_that_add(execution):
    """Where two add, a row has what PEFT makes of both adapters; with one that does not, it is refused."""
    model, ids, ones = with_adapters(), prompts(2), torch.ones(2, dtype=torch.long)
    adding = [RowWeights(name, ones, adds=True, execution=execution) for name in RANKS]
    for count in (2, 3):
        found = held(model, Compose(*adding[:count]), ids=ids)
        assert torch.equal(held(model, Compose(*adding[:count], adding[0]), ids=ids), found)
        activate(model, *list(RANKS)[:count])
        close(found, held(model, ids=ids))
        activate(model, "first")
    mixed = torch.arange(2 * T).view(2, T) % 4
    some = [RowWeights(n, ((mixed >> k) & 1), adds=True, execution=execution) for k, n in enumerate(["first", "third"])]
    for orders in permutations(some):
        found = held(model, Compose(*orders), ids=ids)
        close(found, held(model, Compose(*some), ids=ids))
    with pytest.raises(RecipeError, match="two holders with different weights"):
        held(model, Compose(adding[0], RowWeights("second", ones)), ids=ids)


def test_fused_maps_have_groups_of_features():
    """One holder takes the queries of a fused map, the other all of it at other rows."""
    recipient, donor = doubles("gpt2")
    _, other = doubles("gpt2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    codes, ids = torch.arange(2 * T).view(2, T) % 3, prompts(2)
    queries = RowWeights(donor, (codes == 1).long(), signature=lambda name, _: (0, int(name == "q")))
    everything = RowWeights(other, (codes == 2).long())
    one = RowWeights({"d": donor, "o": other}, codes, signature=lambda name, _: (0, int(name == "q"), 2))
    expected = held(recipient, one, ids=ids)
    assert torch.equal(held(recipient, queries, everything, ids=ids), expected)
    assert torch.equal(held(recipient, everything, queries, ids=ids), expected)
    assert hook_count(recipient) == 0


def test_sources_are_equal_where_they_are_the_same():
    _, donor = doubles("llama", **TWO)
    assert ModelSource(donor) == ModelSource(donor) != ModelSource(copy.deepcopy(donor))
    assert len({AdapterSource("a"), AdapterSource("a"), AdapterSource("b")}) == 2
    assert make_sources({"x": "a"})["x"] == AdapterSource("a")
    assert (
        len({RowSource(AdapterSource("a")), RowSource(AdapterSource("a"), 1.0, "named"), RowSource(ModelSource(donor))})
        == 2
    )


# Dropout by counting.


def test_a_batch_in_parts_has_the_dropout_of_the_whole():
    model, ids = with_adapters(lora_dropout=0.5).train(), prompts(4)
    rows, numbers = RowWeights({n: n for n in RANKS}), torch.arange(4)
    codes = torch.tensor([1, 2, 3, 1])
    with rows.attach(model), torch.no_grad():
        rows.codes, rows.dropout.step = codes, 5
        whole = run(model, ids)
        for part in (numbers[:1], numbers[1:], numbers[[2, 0]]):
            rows.codes, rows.dropout.row_numbers = codes[part], part
            close(run(model, ids[part]), whole[part])
        rows.codes, rows.dropout.row_numbers = codes, None
        padded = torch.cat([torch.zeros(4, 2, dtype=torch.long), ids], dim=1)
        mask = (torch.arange(T + 2) >= 2).long().expand(4, -1)
        shifted = model(padded, attention_mask=mask).logits[:, 2:]
        close(shifted, whole, 1e-5)  # rotary angles are in float32
        for change in ({"step": 6}, {"step": 5, "seed": 1}):
            for name, value in change.items():
                setattr(rows.dropout, name, value)
            assert not torch.allclose(run(model, ids), whole)
        rows.dropout.row_numbers = torch.arange(3)
        with pytest.raises(PositionError, match=r"row_numbers has shape \(3,\), but the pass has 4 rows"):
            run(model, ids)


def test_without_a_step_passes_are_counted():
    model, ids = with_adapters(lora_dropout=0.5).train(), prompts(2)
    ones = torch.ones(2, dtype=torch.long)
    rows = RowWeights("first", ones)
    with rows.attach(model), torch.no_grad():
        passes = [run(model, ids) for _ in range(2)]
    assert not torch.equal(*passes)
    again = RowWeights("first", ones, dropout=CountedDropout(step=1))
    assert torch.equal(held(model, again, ids=ids), passes[1])


def test_dropout_in_a_fused_map_moves_no_generator():
    model = tiny_model("gpt2")
    options = {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": False, "lora_dropout": 0.5}
    inject_adapter_in_model(LoraConfig(fan_in_fan_out=True, **options), model, adapter_name="first")
    codes, ids = torch.arange(2 * T).view(2, T) % 2, prompts(2)
    rows = RowWeights("first", codes, signature=lambda name, _: (0, int(name == "v")))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.train()
    before = torch.get_rng_state()
    with rows.attach(model):
        run(model, ids).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    quiet = held(model.eval(), rows, ids=ids)
    assert not torch.equal(held(model.train(), rows, ids=ids), quiet)


def test_coins():
    tokens = torch.arange(4000)
    coins = kept(11, tokens, 64, 0.3)
    n = coins.numel()
    assert abs(float(coins.float().mean()) - 0.7) < 4 * (0.21 / n) ** 0.5
    for axis, other in ((0, 4000), (1, 64)):
        share = coins.float().mean(axis)
        assert float((share - 0.7).abs().max()) < 5 * (0.21 / other) ** 0.5
    x = coins.double() - 0.7
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x, kept(12, tokens, 64, 0.3).double() - 0.7)):
        assert abs(float((a * b).mean())) < 5 * 0.21 / n**0.5
    assert not kept(11, tokens, 64, 1.0).any()
    assert torch.equal(kept(11, tokens.flip(0), 64, 0.3).flip(0), coins)
    assert torch.equal(kept(11, tokens, 8, 0.3), coins[:, :8])
