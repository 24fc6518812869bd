"""Rows from several weight sources in one call, against a loop that runs each row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp.core.hooks.intervention import Attachment
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.masked_linear import MaskedHooks, MaskedMap, masked_rows
from lightning_interp.core.weights.row_masks import RowMask
from lightning_interp.errors import IncompatibleModelError, PositionError

pytestmark = pytest.mark.kernels

EXECUTIONS = ("auto", "overwrite", "partition", "dense")
WIDTH, OUT = 4, 6


def linears(count, seed=0, out=OUT):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        layer = nn.Linear(WIDTH, out)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.append(layer)
    return made


def random_input(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def sources(draw, count=3, low=0):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    row = st.lists(st.integers(low, count - 1), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


def by_loop(x, maps, source):
    """``[B, T, ...]``, one token at a time."""
    batch, length = source.shape
    rows = [[maps[int(source[b, t])](x[b : b + 1, t : t + 1]) for t in range(length)] for b in range(batch)]
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# The pure function


HOW = st.sampled_from(EXECUTIONS)


@settings(max_examples=60)
@given(HOW, sources())
def test_tokens_against_a_loop(execution, source):
    maps = dict(enumerate(linears(3)))
    x = random_input(*source.shape, WIDTH)
    expected = by_loop(x, maps, source)
    close(masked_rows(x, maps, RowMask(source), execution=execution), expected)
    flat = masked_rows(x.flatten(0, 1), maps, RowMask(source), execution=execution)
    close(flat, expected.flatten(0, 1))
    assert flat.shape == (source.numel(), OUT)


@settings(max_examples=60)
@given(HOW, st.integers(1, 3), sources())
def test_heads_against_a_loop(execution, heads, source):
    maps = dict(enumerate(linears(3)))
    x = random_input(*source.shape, heads, WIDTH)
    expected = by_loop(x, maps, source)
    close(masked_rows(x, maps, RowMask(source), execution=execution), expected)
    first = masked_rows(x.transpose(1, 2), maps, RowMask(source), execution=execution)
    close(first, expected.transpose(1, 2))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_as_many_heads_as_tokens(execution):
    """The shape alone does not tell [B, T, H, d] from a view [B, H, T, d]; the strides do."""
    maps = dict(enumerate(linears(2)))
    source = torch.tensor([[0, 1, 1], [1, 0, 0]])
    x = random_input(2, 3, 3, WIDTH)
    expected = by_loop(x, maps, source)
    assert not torch.allclose(expected, by_loop(x.transpose(1, 2), maps, source).transpose(1, 2))
    close(masked_rows(x, maps, RowMask(source), execution=execution), expected)
    close(masked_rows(x.transpose(1, 2), maps, RowMask(source), execution=execution), expected.transpose(1, 2))


class PerHead(nn.Module):
    """A norm for each head on ``[B, H, T, d]``, as StableLM 2 has it."""

    def __init__(self, heads, seed):
        super().__init__()
        self.weight = nn.Parameter(random_input(heads, WIDTH, seed=seed))

    def forward(self, x):
        parts = torch.split(x, 1, dim=1)
        return torch.cat([part * weight for part, weight in zip(parts, self.weight, strict=True)], dim=1)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_modules_that_look_at_heads_see_heads(execution):
    maps = {0: PerHead(2, 0), 1: PerHead(2, 1), 2: PerHead(2, 2)}
    source = torch.tensor([[0, 1, 1, 2], [2, 0, 0, 0]])
    x = random_input(2, 4, 2, WIDTH).transpose(1, 2)
    found = masked_rows(x, maps, RowMask(source), execution=execution)
    for b in range(2):
        for t in range(4):
            close(found[b : b + 1, :, t : t + 1], maps[int(source[b, t])](x[b : b + 1, :, t : t + 1]))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("only", [0, 2])
def test_one_source_alone_is_that_source_bit_for_bit(execution, only):
    maps = dict(enumerate(linears(3)))
    x = random_input(2, 5, WIDTH)
    found = masked_rows(x, maps, RowMask(torch.full((2, 5), only)), execution=execution)
    assert torch.equal(found, maps[only](x))


@given(sources(count=2))
def test_overwriting_keeps_the_recipients_rows_bit_for_bit(source):
    maps = dict(enumerate(linears(2)))
    x = random_input(*source.shape, WIDTH)
    found = masked_rows(x, maps, RowMask(source), execution="overwrite")
    assert torch.equal(found[source == 0], maps[0](x)[source == 0])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_reach_every_source_by_its_own_rows(execution):
    source = torch.tensor([[0, 1, 2, 1], [2, 0, 0, 1]])
    x, weights = random_input(2, 4, WIDTH), random_input(2, 4, OUT, seed=2)

    def gradients(run):
        layers = linears(3)
        given_x = x.clone().requires_grad_()
        (run(given_x, dict(enumerate(layers))) * weights).sum().backward()
        return [given_x.grad, *(p.grad for layer in layers for p in layer.parameters())]

    found = gradients(lambda x, maps: masked_rows(x, maps, RowMask(source), execution=execution))
    for one, other in zip(found, gradients(lambda x, maps: by_loop(x, maps, source)), strict=True):
        close(one, other)


@pytest.mark.parametrize("inference", [False, True])
def test_inputs_are_never_written_to(inference):
    source = torch.tensor([[0, 1, 0]])
    with torch.inference_mode(inference), torch.no_grad():
        x = random_input(1, 3, WIDTH)
        before = x.clone()
        found = masked_rows(x, {0: nn.Identity(), 1: lambda rows: -rows}, RowMask(source), execution="overwrite")
    assert torch.equal(x, before)
    assert torch.equal(found[0, 1], -before[0, 1])


@given(sources(), HOW)
def test_sources_that_add_a_difference(source, execution):
    base, *extra = linears(3)
    deltas = {1: extra[0], 2: extra[1]}
    maps = {0: base, **{k: lambda x, d=d: base(x) + d(x) for k, d in deltas.items()}}
    x = random_input(*source.shape, WIDTH)
    found = masked_rows(x, maps, RowMask(source), execution=execution, deltas=deltas)
    close(found, by_loop(x, maps, source))


@given(sources())
def test_what_a_mask_knows(source):
    mask, flat = RowMask(source), source.flatten().tolist()
    assert mask.used == tuple(sorted(set(flat)))
    assert mask.uniform == (flat[0] if len(set(flat)) == 1 else None)
    assert mask.share == pytest.approx(sum(k != 0 for k in flat) / len(flat))
    for k in mask.used:
        assert mask.rows(k).tolist() == [i for i, one in enumerate(flat) if one == k]
    for n in range(1, source.shape[1] + 1):
        assert torch.equal(mask.tail(n).source, source[:, -n:])
        assert mask.tail(n) is mask.tail(n)


def test_a_tensor_without_a_row_for_each_token():
    mask = RowMask(torch.tensor([[0, 1, 0], [0, 0, 1]]))
    with pytest.raises(PositionError, match=r"received a tensor of shape \(2, 5, 4\), .* each of the 2 x 3 tokens"):
        masked_rows(torch.zeros(2, 5, 4), {0: nn.Identity(), 1: nn.Identity()}, mask)


# On a hooked module


class Handles:
    """The part of an attachment that a masked map needs."""

    def __init__(self):
        self.handles = []

    def add(self, handle):
        self.handles.append(handle)

    def remove(self):
        while self.handles:
            self.handles.pop().remove()


def run_hooked(module, x, masked):
    handles = Handles()
    handles.add(MaskedHooks(masked))
    try:
        with torch.no_grad():
            return module(x)
    finally:
        handles.remove()


@settings(max_examples=120)
@given(HOW, st.integers(0, 2), st.booleans(), sources())
def test_a_module_against_a_loop(execution, native, takes_empty, source):
    maps = dict(enumerate(linears(3)))
    x, mask = random_input(*source.shape, WIDTH), RowMask(source)
    masked = MaskedMap(
        maps[native], native, {k: m for k, m in maps.items() if k != native}, lambda: [(None, mask)], execution,
        takes_empty=takes_empty,
    )  # fmt: skip
    plain = maps[native](x)
    with torch.no_grad():
        expected = by_loop(x, maps, source)
    close(run_hooked(maps[native], x, masked), expected)
    close(run_hooked(maps[native], x.flatten(0, 1), masked), expected.flatten(0, 1))
    assert torch.equal(maps[native](x), plain)


@settings(max_examples=40)
@given(HOW, st.data())
def test_groups_of_columns_against_a_loop(execution, data):
    """A fused map: each group of output features follows a mask of its own."""
    first = data.draw(sources())
    codes = st.lists(st.integers(0, 2), min_size=first.numel(), max_size=first.numel())
    masks = [first, *(torch.tensor(data.draw(codes)).view(first.shape) for _ in range(2))]
    columns = [torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([2, 5])]
    maps = dict(enumerate(linears(3)))
    x = random_input(*first.shape, WIDTH)
    groups = [(c, RowMask(m)) for c, m in zip(columns, masks, strict=True)]
    found = run_hooked(maps[0], x, MaskedMap(maps[0], 0, {1: maps[1], 2: maps[2]}, lambda: groups, execution))
    for group, source in zip(columns, masks, strict=True):
        with torch.no_grad():
            close(found[..., group], by_loop(x, maps, source)[..., group])


def test_only_the_rows_that_are_needed_are_computed():
    sizes = {}

    class Counting(nn.Linear):
        def forward(self, x):
            sizes[self.name] = sizes.get(self.name, 0) + x.shape[:-1].numel()
            return super().forward(x)

    made = {}
    for k in range(3):
        made[k] = Counting(WIDTH, OUT)
        made[k].name = k
    source = torch.tensor([[0, 1, 1, 2, 1], [1, 1, 2, 2, 0]])
    for execution, expected in {
        "partition": {0: 2, 1: 5, 2: 3},
        "overwrite": {0: 10, 1: 5, 2: 3},
        "dense": {0: 10, 1: 10, 2: 10},
        "auto": {0: 2, 1: 5, 2: 3},
    }.items():
        sizes.clear()
        mask = RowMask(source)
        masked = MaskedMap(made[0], 0, {1: made[1], 2: made[2]}, lambda mask=mask: [(None, mask)], execution)
        run_hooked(made[0], random_input(2, 5, WIDTH), masked)
        assert sizes == expected, execution
    sizes.clear()
    rare = RowMask(torch.tensor([[0, 1, 0, 0, 0]]))
    run_hooked(made[0], random_input(1, 5, WIDTH), MaskedMap(made[0], 0, {1: made[1]}, lambda: [(None, rare)]))
    assert sizes == {0: 5, 1: 1}
    sizes.clear()
    all_donor = RowMask(torch.ones(2, 5, dtype=torch.long))
    run_hooked(made[0], random_input(2, 5, WIDTH), MaskedMap(made[0], 0, {1: made[1]}, lambda: [(None, all_donor)]))
    assert sizes == {0: 0, 1: 10}


def test_a_head_that_is_fed_the_last_columns():
    maps = dict(enumerate(linears(2)))
    source = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    x, mask = random_input(2, 4, WIDTH), RowMask(source)
    masked = MaskedMap(maps[0], 0, {1: maps[1]}, lambda: [(None, mask)])
    with torch.no_grad():
        expected = by_loop(x, maps, source)
    for n in (1, 2, 4):
        close(run_hooked(maps[0], x[:, -n:], masked), expected[:, -n:])


def test_a_module_with_arguments_of_its_own_shape():
    """A position embedding is called with [1, T] for all rows of the batch."""
    tables = [nn.Embedding(8, WIDTH) for _ in range(2)]
    source = torch.tensor([[0, 1, 1], [1, 0, 0]])
    masked = MaskedMap(tables[0], 0, {1: tables[1]}, lambda: [(None, RowMask(source))], per_call=True)
    found = run_hooked(tables[0], torch.tensor([[2, 3, 4]]), masked)
    assert found.shape == (2, 3, WIDTH)
    for b in range(2):
        for t in range(3):
            assert torch.equal(found[b, t], tables[int(source[b, t])].weight[2 + t])


def test_outputs_that_come_with_more():
    class Pair(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor, "router"

    own, other = Pair(2.0), Pair(3.0)
    mask = RowMask(torch.tensor([[0, 1]]))
    found, rest = run_hooked(own, torch.ones(1, 2, 1), MaskedMap(own, 0, {1: other}, lambda: [(None, mask)]))
    assert found.flatten().tolist() == [2.0, 3.0]
    assert rest == "router"


def test_an_exception_in_one_call_does_not_reach_the_next():
    class Fragile(nn.Linear):
        fail = True

        def forward(self, x):
            if self.fail:
                raise RuntimeError("once")
            return super().forward(x)

    own, (other,) = Fragile(WIDTH, OUT), linears(1)
    mask, x = RowMask(torch.tensor([[0, 1]])), random_input(1, 2, WIDTH)
    handles = Handles()
    handles.add(MaskedHooks(MaskedMap(own, 0, {1: other}, lambda: [(None, mask)], "overwrite")))
    with pytest.raises(RuntimeError, match="once"):
        own(x)
    own.fail = False
    found = own(x)
    close(found, torch.cat([nn.functional.linear(x[:, :1], own.weight, own.bias), other(x[:, 1:])], dim=1))
    handles.remove()


def test_a_second_masked_map_on_one_module():
    own, other = linears(2)
    masked = MaskedMap(own, 0, {1: other}, lambda: [(None, RowMask(torch.tensor([[0, 1]])))])
    handles = Handles()
    handles.add(MaskedHooks(masked))
    with pytest.raises(IncompatibleModelError, match="Linear already follows another masked map"):
        handles.add(MaskedHooks(masked))
    handles.remove()
    handles.add(MaskedHooks(masked))
    handles.remove()
    assert not own._forward_hooks
    assert not own._forward_pre_hooks


def test_steps_come_from_the_attachment():
    from lightning_interp.testing import tiny_model

    model = tiny_model("llama")
    attachment, seen, record = Attachment(ModelMap.build(model)), [], {}
    linear = model.model.layers[0].mlp.up_proj

    def odd_tokens():
        seen.append(attachment.step.positions)
        return [(None, RowMask(seen[-1] % 2))]

    with attachment, torch.no_grad():
        attachment.add(MaskedHooks(MaskedMap(linear, 0, {1: lambda x: x.new_zeros(*x.shape[:-1], 64)}, odd_tokens)))
        linear.register_forward_hook(lambda _, __, out: record.update(out=out))
        model(torch.arange(5, 9)[None])
    assert seen[0].tolist() == [[0, 1, 2, 3]]
    assert (record["out"][0, [1, 3]] == 0).all()
    assert (record["out"][0, [0, 2]] != 0).any()
