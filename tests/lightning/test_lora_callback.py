"""An adapter in somebody's own LightningModule."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import peft
import pytest
import pytorch_lightning
import rig
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lightning_interp.errors import (
    IncompatibleModelError,
    ManifestError,
    QuantizedModelError,
    RecipeError,
    SiteError,
    UnsupportedStrategyError,
)
from lightning_interp.lora import LoraCallback, UpdateNormCallback, update_norms
from lightning_interp.models import CausalLM, LoraSettings
from lightning_interp.testing import tiny_model

pytestmark = [
    pytest.mark.usefixtures("two_layers"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

LORA = LoraSettings(r=4, alpha=8, target_modules=["v_proj", "down_proj", "c_attn", "c_proj"])
IDS = torch.arange(60).view(6, 10) % 50


def module_of(library=L):
    """A LightningModule as a user writes it: a model, a head of its own, an optimiser over all parameters."""

    class Theirs(library.LightningModule):
        def __init__(self, model=None, lr=1e-2):
            super().__init__()
            self.lm = tiny_model("llama") if model is None else model
            self.head = nn.Linear(self.lm.config.hidden_size, 1)
            nn.init.constant_(self.head.weight, 0.1)
            nn.init.zeros_(self.head.bias)
            self.lr = lr

        def training_step(self, batch, batch_idx):
            out = self.lm(input_ids=batch, labels=batch, output_hidden_states=True, use_cache=False)
            return out.loss + self.head(out.hidden_states[-1]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    return Theirs


Theirs = module_of()


def loader(rows=IDS, size=2):
    return torch.utils.data.DataLoader(rows, batch_size=size)


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(folder, module, *callbacks, ckpt_path=None, kind=L.Trainer, **options):
    run = rig.trainer(folder, *callbacks, kind=kind, **{"max_epochs": 2, **options})
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


# Put in


@pytest.mark.parametrize(("library", "family"), [(L, "llama"), (pytorch_lightning, "gpt2")])
def test_the_adapter_and_their_own_head_are_trained_and_the_base_stays_to_the_bit(tmp_path, library, family):
    module, plain = module_of(library)(tiny_model(family)), tiny_model(family)
    fit(tmp_path, module, LoraCallback(LORA), kind=library.Trainer)
    state = {name.replace(".base_layer", ""): tensor for name, tensor in module.state_dict().items()}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[f"lm.{name}"], tensor), name
    ups = [tensor for name, tensor in state.items() if "lora_B" in name]
    assert ups
    assert all(bool(tensor.any()) for tensor in ups)
    assert not torch.equal(module.head.weight, torch.full((1, 32), 0.1))
    assert not module.strict_loading
    for layer in module.lm.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(False)
    with torch.no_grad():
        assert torch.equal(module.lm(IDS).logits, plain(IDS).logits)


def test_at_the_start_nothing_is_changed_and_the_count_is_that_of_the_ranks():
    module, plain = Theirs(), tiny_model("llama")
    LoraCallback(LORA).inject(module)
    with torch.no_grad():
        assert torch.equal(module.lm(IDS).logits, plain(IDS).logits)
    maps = [part for name, part in plain.named_modules() if name.endswith(("v_proj", "down_proj"))]
    trained = sum(parameter.numel() for parameter in module.lm.parameters() if parameter.requires_grad)
    assert trained == sum(LORA.r * (part.in_features + part.out_features) for part in maps)
    assert all(parameter.requires_grad for parameter in module.head.parameters())


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_alpha_equal_to_the_rank_is_a_scale_of_one(rank):
    module = Theirs()
    LoraCallback(LoraSettings(r=rank, alpha=rank, target_modules=["q_proj"])).inject(module)
    assert module.lm.model.layers[0].self_attn.q_proj.scaling == {"default": 1.0}


def test_a_fit_after_a_fit_goes_on_with_the_adapter(tmp_path):
    module = Theirs()
    fit(tmp_path, module, LoraCallback(LORA), max_steps=2)
    before = weights(module)
    with pytest.raises(IncompatibleModelError, match=r"LlamaForCausalLM carries an adapter with r=4, but .* has r=2"):
        fit(tmp_path, module, LoraCallback(LoraSettings(r=2, target_modules=LORA.target_modules)))
    assert equal(weights(module), before)
    fit(tmp_path, module, LoraCallback(LORA), max_steps=2)
    assert weights(module).keys() == before.keys()
    rig.trainer(tmp_path, LoraCallback(LORA)).test(module, loader(), verbose=False)


def test_an_adapter_of_another_name_is_refused(tmp_path):
    module = Theirs()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), module.lm, adapter_name="other")
    with pytest.raises(
        IncompatibleModelError, match=r"carries the adapters \['other'\], expected one called 'default'"
    ):
        LoraCallback(LORA).inject(module)


def test_of_two_models_one_is_named(tmp_path):
    module = Theirs()
    module.reference = tiny_model("llama", seed=1)
    with pytest.raises(SiteError, match=r"holds 2 Hugging Face models: 'lm' .*, 'reference' .*Choose one with target="):
        fit(tmp_path, module, LoraCallback(LORA))
    both = [LoraCallback(LORA, target="lm"), LoraCallback(LORA, target="reference", name="other")]
    for callback in both:
        callback.inject(module)
    adapted = [name for name in module.state_dict() if "lora_A" in name]
    assert {name.split(".")[0] for name in adapted} == {"lm", "reference"}


class Late(Theirs):
    """Makes its model where Lightning makes large ones."""

    def __init__(self):
        super().__init__()
        del self.lm

    def configure_model(self):
        self.lm = tiny_model("llama")


def test_a_model_that_is_not_there_yet_is_refused_with_the_way_out(tmp_path):
    match = r"LoraCallback finds no model to adapt: Late holds no Hugging Face model.*build it in __init__, or call "
    with pytest.raises(SiteError, match=match):
        fit(tmp_path, Late(), LoraCallback(LORA))

    class Inside(Late):
        def configure_model(self):
            super().configure_model()
            LoraCallback(LORA).inject(self)

    module = Inside()
    fit(tmp_path, module, UpdateNormCallback(), max_steps=2)
    assert update_norms(module).total > 0


# Optimisers


def test_an_optimiser_without_the_adapter_is_refused(tmp_path):
    class Early(Theirs):
        def __init__(self):
            super().__init__()
            self.collected = list(self.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.collected, lr=0.1)

    match = r"8 of 8 parameters of the adapter are in no optimiser: model.layers.0.*lora_A.*, so Early would"
    with pytest.raises(IncompatibleModelError, match=match):
        fit(tmp_path, Early(), LoraCallback(LORA))


def test_a_frozen_adapter_is_refused(tmp_path):
    class Freeze(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.lm.requires_grad_(False)

    with pytest.raises(IncompatibleModelError, match=r"8 of 8 parameters of the adapter ask for no gradient: model"):
        fit(tmp_path, Theirs(), LoraCallback(LORA), Freeze())


# Checkpoints


class Stop(Callback):
    """Ends the run as a crash would."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            raise ZeroDivisionError


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, measured = Theirs(), LoraCallback(LORA, every=1)
    fit(tmp_path, whole, measured)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Theirs(), LoraCallback(LORA, every=1), keep, Stop(), enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    adapter = {name for name in whole.state_dict() if "lora_" in name}
    assert set(saved) == adapter | {"head.weight", "head.bias"}
    resumed, again = Theirs(), LoraCallback(LORA, every=1)
    torch.manual_seed(1234)  # what ran before must not matter
    run = fit(tmp_path, resumed, again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert run.global_step == 6
    assert equal(weights(resumed), weights(whole))
    assert again.history == measured.history
    assert [entry["step"] for entry in again.history] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    fit(tmp_path, Theirs(), LoraCallback(LORA), max_steps=1).save_checkpoint(path)
    other = LoraSettings(r=4, alpha=4, target_modules=LORA.target_modules)
    with pytest.raises(IncompatibleModelError, match=r"The checkpoint's adapter was made with alpha=8, but .* alpha=4"):
        fit(tmp_path, Theirs(), LoraCallback(other), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if "lora_B" in name)
    checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, path)
    match = rf"does not fit the adapter of Theirs: it lacks '{name}' \(1 missing\)"
    with pytest.raises(IncompatibleModelError, match=match):
        fit(tmp_path, Theirs(), LoraCallback(LORA), ckpt_path=path)
    with pytest.raises(IncompatibleModelError, match=match):
        rig.trainer(tmp_path, LoraCallback(LORA)).test(Theirs(), loader(), ckpt_path=path, weights_only=True)


def test_averaged_weights_are_saved_whole_and_gone_on_with(tmp_path):
    module, path = Theirs(), tmp_path / "ema.ckpt"
    fit(tmp_path, module, LoraCallback(LORA), EMAWeightAveraging(decay=0.5), max_steps=3).save_checkpoint(path)
    again = Theirs()
    run = fit(tmp_path, again, LoraCallback(LORA), EMAWeightAveraging(decay=0.5), ckpt_path=path, max_steps=4)
    assert run.global_step == 4
    assert update_norms(again).total > 0


def classifier():
    config = copy.deepcopy(tiny_model("llama").config)
    config.num_labels, config.pad_token_id = 2, 0
    return LlamaForSequenceClassification(config).eval()


class Classifies(Theirs):
    def training_step(self, batch, batch_idx):
        return self.lm(input_ids=batch, labels=batch[:, 0] % 2).loss


def test_a_head_inside_of_the_model_is_trained_if_it_is_named(tmp_path):
    module = Classifies(classifier())
    before = module.lm.score.weight.detach().clone()
    settings = LoraSettings(r=2)  # of all linear maps but the scores'
    run = fit(tmp_path, module, LoraCallback(settings, also_train="score"), max_steps=2)
    assert not torch.equal(module.lm.score.weight, before)
    run.save_checkpoint(tmp_path / "last.ckpt")
    names = set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert {name for name in names if "lora_" not in name} == {"lm.score.weight", "head.weight", "head.bias"}
    with pytest.raises(SiteError, match=r"also_train='scores': LlamaForSequenceClassification has no module"):
        LoraCallback(settings, also_train=["scores"]).inject(Classifies(classifier()))
    with pytest.raises(RecipeError, match=r"export='out', also_train=\['score'\]\): an adapter's folder would lack"):
        LoraCallback(settings, also_train="score", export="out")


# What is measured and exported


class Kept(Logger):
    """A logger that keeps what it is given."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_, **__):
        pass


def test_the_norm_is_logged_every_so_many_steps_and_training_is_undisturbed(tmp_path):
    plain, module, logger = Theirs(), Theirs(), Kept()
    fit(tmp_path, plain, LoraCallback(LORA, every=10**6))
    run = fit(tmp_path, module, LoraCallback(LORA, every=2, per_module=True), logger=logger)
    assert equal(weights(module), weights(plain))
    rows = {step: row for step, row in logger.rows if "lora/update_norm" in row}
    assert sorted(rows) == [2, 4, 6]
    norms, last = update_norms(module), rows[6]
    assert last["lora/update_norm"] == norms.total == pytest.approx(float(run.callback_metrics["lora/update_norm"]))
    assert {key.removeprefix("lora/update_norm/"): v for key, v in last.items() if "norm/" in key} == norms.modules
    values = [rows[step]["lora/update_norm"] for step in (2, 4, 6)]
    assert 0 < values[0] < values[1] < values[2]


def test_a_causal_lms_own_adapter_is_measured_too(tmp_path):
    module, callback = CausalLM("tiny:llama", lora=LoraSettings(r=2, use_dora=True), lr=1e-2), UpdateNormCallback()
    rig.trainer(tmp_path, callback, max_steps=2).fit(
        module,
        torch.utils.data.DataLoader([{"input_ids": IDS, "labels": IDS}], batch_size=None),
    )
    assert callback.history[-1]["update_norm"] == update_norms(module).total > 0


def test_the_adapter_is_exported_as_an_ordinary_folder(tmp_path):
    module, out = Theirs(), tmp_path / "out"
    fit(tmp_path, module, LoraCallback(LORA, export=out, base="tiny:llama"), max_steps=2)
    read = peft.PeftModel.from_pretrained(tiny_model("llama"), out).eval()
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, module.lm(IDS).logits)
    with pytest.raises(ManifestError, match="out exists already and is not empty"):  # before anything is trained
        fit(tmp_path, Theirs(), LoraCallback(LORA, export=out))
    fit(tmp_path, module, LoraCallback(LORA, export=out, overwrite=True, base="tiny:llama"), max_steps=2)


def test_it_travels():
    callback, module = LoraCallback(LORA, every="epoch"), Theirs()
    callback.inject(module)
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):  # noqa: S301
        assert (twin.settings, twin.state_key, twin._map) == (LORA, callback.state_key, None)
        twin.inject(copy.deepcopy(module))


def test_a_settings_file_can_name_it():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LoraCallback, "lora")
    read = parser.parse_args(["--lora.settings.r=2", "--lora.every=10", "--lora.also_train=[score]"])
    callback = parser.instantiate_classes(read).lora
    assert (callback.settings, callback.every_n, callback.also_train) == (LoraSettings(r=2), 10, ("score",))


# Several processes


class SameEverywhere(Callback):
    """Compares the trained weights of all ranks."""

    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad])
        if not all(torch.equal(flat, other) for other in trainer.strategy.all_gather(flat)):
            raise RuntimeError("the ranks went apart")


class Shared(Theirs):
    """Splits each batch among the processes."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[self.global_rank :: self.trainer.world_size], batch_idx)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    alone, both = Shared(), Shared()
    fit(tmp_path, alone, LoraCallback(LORA), max_epochs=1)
    callback = LoraCallback(LORA, export=tmp_path / "out", base="tiny:llama")
    callback.inject(both)
    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    fit(tmp_path, both, callback, SameEverywhere(), max_epochs=1, **two)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], tensor, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_an_adapter_that_is_left_in_a_forked_process_is_said(tmp_path):
    launcher = type("_MultiProcessingLauncher", (), {})()
    run = rig.trainer(tmp_path)
    run.strategy._launcher = launcher
    with pytest.warns(UserWarning, match=r"LoraCallback on Theirs puts the adapter in inside of a forked or spawned"):
        LoraCallback(LORA).setup(run, Theirs(), "fit")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("FSDPStrategy", "use ModelParallelStrategy"), ("DeepSpeedStrategy", "use DDP"), ("ModelParallelStrategy", "DDP")],
)
def test_strategies_that_keep_no_whole_weights_are_refused(tmp_path, name, remedy):
    run, module = rig.trainer(tmp_path, LoraCallback(LORA)), Theirs()
    run.strategy.__class__ = type(name, (type(run.strategy),), {})
    with pytest.raises(UnsupportedStrategyError, match=rf"LoraCallback on Theirs .*{name}.*{remedy}"):
        run.fit(module, loader())
    assert not any("lora_" in key for key in module.state_dict())


# Quantised bases


def test_lightnings_own_quantisation_is_refused_with_the_right_road(tmp_path, monkeypatch):
    run, module = rig.trainer(tmp_path, LoraCallback(LORA)), Theirs()
    plugin = BitsandbytesPrecision.__new__(BitsandbytesPrecision)  # it cannot be made without CUDA
    monkeypatch.setattr(type(run.strategy), "precision_plugin", plugin)
    with pytest.raises(QuantizedModelError, match=r"LoraCallback on Theirs cannot use BitsandbytesPrecision.*BitsAnd"):
        run.fit(module, loader())


def test_it_trains_on_a_4bit_base_of_transformers(tmp_path, portable_4bit):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True)

    def base():
        return Theirs(LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised))

    module = base()
    packed = {name: p.detach().clone() for name, p in module.lm.named_parameters()}
    run = fit(tmp_path, module, LoraCallback(LORA), max_steps=2)
    now = {name.replace(".base_layer", ""): p for name, p in module.lm.named_parameters() if "lora_" not in name}
    assert all(torch.equal(now[name].to(tensor.dtype), tensor) for name, tensor in packed.items())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = base()
    fit(tmp_path, again, LoraCallback(LORA), ckpt_path=tmp_path / "last.ckpt", max_steps=2)
    adapter = {name: p for name, p in module.named_parameters() if "lora_" in name}
    assert all(torch.equal(dict(again.named_parameters())[name], p) for name, p in adapter.items())
    assert update_norms(again).total > 0


def test_settings_of_another_kind_are_refused():
    with pytest.raises(RecipeError, match=r"settings=\{'r': 4\}\): expected LoraSettings"):
        LoraCallback({"r": 4})
