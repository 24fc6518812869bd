"""What cannot work is refused, with the name of the module and the remedy."""

from __future__ import annotations

import lightning.pytorch as new
import pytest
import pytorch_lightning as old
import torch
from changes import IDS, Add, close, logits
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from lightning_interp.core.hooks.checks import (
    check_dense,
    check_hookable,
    check_strategy,
    check_weights,
    quantized_modules,
)
from lightning_interp.core.model.head import read_head
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import CompiledModelError, QuantizedModelError, UnsupportedStrategyError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.testing import needs, tiny_model, tiny_pair

CHANGE = Add(Site("resid_post", 1))


@pytest.fixture
def hook_guards():
    """Let compiled code look at hooks."""
    import torch._dynamo.config as config

    before, config.skip_nnmodule_hook_guards = config.skip_nnmodule_hook_guards, False
    yield
    config.skip_nnmodule_hook_guards = before
    torch._dynamo.reset()


# Compiled


class Module(new.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def one_block(model):
    model.model.layers[2].compile(backend="eager")
    return model


def forward_method(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def in_a_module(model):
    return Module(torch.compile(model, backend="eager"))


def compiled_module(model):
    return from_compiled(torch.compile(Module(model), backend="eager"))


COMPILED = {
    wrapped: "'OptimizedModule' is compiled",
    in_place: "'LlamaForCausalLM' is compiled",
    one_block: r"'model\.layers\.2' is compiled",
    forward_method: "'LlamaForCausalLM' is compiled",
    in_a_module: "'model' is compiled",
    compiled_module: "'Module' is compiled",
}


@pytest.mark.parametrize("how", COMPILED, ids=lambda how: how.__name__)
def test_compiled_models(how):
    module = how(tiny_model("llama"))
    with pytest.raises(CompiledModelError, match=COMPILED[how] + r".*skip_nnmodule_hook_guards=False"):
        CHANGE.attach(module)


@pytest.mark.parametrize("how", COMPILED, ids=lambda how: how.__name__)
def test_compiled_models_whose_hooks_are_looked_at(how, hook_guards):
    check_hookable(how(tiny_model("llama")))


def test_why_compiled_models_are_refused(hook_guards):
    """With the flag as torch ships it, a hook that comes after the first call does nothing; without it, it acts."""
    import torch._dynamo.config as config

    ids = torch.zeros(1, 2)
    for skip, acts in ((True, False), (False, True)):
        torch._dynamo.reset()
        config.skip_nnmodule_hook_guards = skip
        model = nn.Sequential(nn.Linear(2, 2))
        compiled = torch.compile(model, backend="eager")
        compiled(ids)
        handle = model[0].register_forward_hook(lambda _, __, out: out + 100)
        assert bool((compiled(ids) > 50).all()) is acts
        handle.remove()
        assert bool((compiled(ids) < 50).all())


# Quantised


class Packed(torch.Tensor):
    """Weights that unpack themselves, as those of torchao: the module stays a plain ``nn.Linear``."""

    @staticmethod
    def __new__(cls, plain):
        made = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, requires_grad=False)
        made.scale = plain.detach().abs().max() / 127
        made.bytes = (plain.detach() / made.scale).round().to(torch.int8)
        return made

    def __tensor_flatten__(self):
        return ["bytes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, *_):
        made = cls(parts["bytes"].float())
        made.bytes, made.scale = parts["bytes"], parts["scale"]
        return made

    def unpacked(self):
        return self.bytes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        plain = [arg.unpacked() if isinstance(arg, Packed) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


def packed(model, name="model.layers.1.mlp.up_proj"):
    module = model.get_submodule(name)
    module.weight = nn.Parameter(Packed(module.weight), requires_grad=False)
    return model


def with_weight(make):
    def change(model):
        module = model.model.layers[1].mlp.up_proj
        weight = module._parameters.pop("weight")
        make(module, weight)
        return model

    return change


@pytest.mark.parametrize(
    "change",
    [
        packed,
        with_weight(lambda m, w: m.register_parameter("weight", nn.Parameter(w.to(torch.float8_e4m3fn), False))),
        with_weight(lambda m, w: m.register_parameter("weight", nn.Parameter(w.to(torch.int8), False))),
        with_weight(lambda m, w: m.register_parameter("W_q", nn.Parameter(w.to(torch.uint8), False))),
        with_weight(lambda m, w: m.register_parameter("weight_packed", nn.Parameter(w.to(torch.int32), False))),
        with_weight(lambda m, w: m.register_buffer("qweight", w.to(torch.int32))),
        with_weight(lambda m, w: setattr(m, "weight", nn.Parameter(Packed(w), requires_grad=False))),
    ],
)
def test_quantised_weights_are_told_by_their_tensors(change):
    _, donor = tiny_pair("llama")
    model = change(tiny_model("llama"))
    assert list(quantized_modules(model)) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(QuantizedModelError, match=r"quantised base: model\.layers\.1\.mlp\.up_proj \(1 modules"):
        Graft(donor, GraftPlan.whole()).attach(model)


def test_dense_weights_of_any_kind_are_not_quantised():
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert quantized_modules(tiny_model("gpt2").to(kind)) == {}
    model = tiny_model("llama")
    model.register_buffer("steps", torch.arange(3))
    model.model.layers[0].mlp.up_proj.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    assert quantized_modules(model.to("meta")) == {}


def test_kinds_of_packed_tensors_count():
    assert set(quantized_modules(packed(tiny_model("llama"))).values()) == {"Linear of Packed"}


def test_a_packed_head_is_read_as_the_map_that_it_applies():
    model = packed(tiny_model("llama"), "lm_head")
    torch.testing.assert_close(read_head(model).weight, model.lm_head.weight.unpacked(), atol=1e-6, rtol=1e-5)


# Wrapped or sharded


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "DeepSpeedEngine"])
def test_wrappers_by_name(kind):
    wrapper = type(kind, (nn.Sequential,), {})(tiny_model("llama"))
    with pytest.raises(UnsupportedStrategyError, match=rf"'policy\.0' is a {kind}: .*FSDP2"):
        CHANGE.attach(nn.ModuleDict({"policy": nn.Sequential(wrapper)}))


@pytest.fixture
def mesh():
    """A mesh of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights(mesh):
    from torch.distributed.fsdp import fully_shard

    model, plain = tiny_model("llama"), tiny_model("llama")
    check_weights(model, purpose="Merging")
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedStrategyError, match=r"Merging needs whole weights, but model\.embed_tokens\.weight"):
        check_weights(model, purpose="Merging")
    with pytest.raises(UnsupportedStrategyError, match=r"full-weight donor needs whole weights.* is sharded"):
        Graft(plain, GraftPlan.whole()).attach(model)
    with CHANGE.attach(plain):
        expected = logits(plain)
    with CHANGE.attach(model):
        close(logits(model), expected)  # activations are whole


# Quantised


def test_dense_models_are_dense():
    assert quantized_modules(tiny_model("gpt2")) == {}
    check_dense(tiny_model("gpt2"), purpose="Grafting", remedy="None.")


@needs(bnb=True)
def test_quantised_models():
    import bitsandbytes as bnb

    recipient, donor = tiny_pair("llama")
    for name in ("q_proj", "k_proj"):
        setattr(recipient.model.layers[1].self_attn, name, bnb.nn.Linear4bit(32, 32))
    recipient.model.layers[2].mlp.up_proj = bnb.nn.Linear8bitLt(32, 64)
    assert list(quantized_modules(recipient)) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.2.mlp.up_proj",
    ]
    message = (
        r"Merging on a quantised base: model\.layers\.1\.self_attn\.q_proj \(3 modules of LlamaForCausalLM\).*Do X\."
    )
    with pytest.raises(QuantizedModelError, match=message):
        check_dense(recipient, purpose="Merging", remedy="Do X.")
    with pytest.raises(QuantizedModelError, match="full-weight donor on a quantised base"):
        Graft(donor, GraftPlan.whole()).attach(recipient)


# Strategies


@pytest.mark.parametrize("library", [new, old], ids=["lightning", "pytorch_lightning"])
def test_strategies(library):
    strategies = library.strategies
    for name in ("SingleDeviceStrategy", "DDPStrategy"):
        for reads in (True, False):
            check_strategy(_bare(getattr(strategies, name)), reads_weights=reads, purpose="Steering")
    parallel = _bare(strategies.ModelParallelStrategy)
    check_strategy(parallel, reads_weights=False, purpose="Steering")
    with pytest.raises(UnsupportedStrategyError, match="Grafting uses weight values, which ModelParallel"):
        check_strategy(parallel, reads_weights=True, purpose="Grafting")
    for name in ("FSDPStrategy", "DeepSpeedStrategy"):
        own = type("Mine", (getattr(strategies, name),), {})
        for kind in (getattr(strategies, name), own):
            message = f"Steering does not support {kind.__name__}: .*DDP"
            with pytest.raises(UnsupportedStrategyError, match=message):
                check_strategy(_bare(kind), reads_weights=False, purpose="Steering")


def _bare(kind):
    return object.__new__(kind)  # some need packages or devices that are not here


def test_plain_models_pass():
    model = tiny_model("llama")
    check_hookable(model)
    check_weights(model, purpose="x")
    with CHANGE.attach(model):
        assert not torch.equal(logits(model), logits(tiny_model("llama")))
        assert logits(model, IDS[:1]).shape == (1, 5, 261)
