"""Activations on disk against plain hooks."""

from __future__ import annotations

import lightning as L
import pytest
import pytorch_lightning as pl
import rig
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_interp import CaptureCallback, Last, Site
from lightning_interp.core.callbacks.capture_callback import load_captures
from lightning_interp.errors import DataError
from lightning_interp.testing import tiny_model

SITES = [Site("resid_post", 1), Site("mlp_out", 0), Site("logits")]


def body(base):
    class Module(base):
        """Runs the model, twice a step if asked."""

        def __init__(self, calls=1):
            super().__init__()
            self.model, self.calls = tiny_model("llama"), calls

        def step(self, batch):
            return sum(self.model(batch + i).logits.mean() for i in range(self.calls))

        def training_step(self, batch, _):
            return self.step(batch)

        def validation_step(self, batch, _):
            self.step(batch)

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.step(batch)

        def predict_step(self, batch, _):
            self.step(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return Module


Module, PlModule = body(L.LightningModule), body(pl.LightningModule)
BATCHES = [torch.arange(8).view(2, 4) + 7 * i for i in range(3)]


def loader(batches=BATCHES):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def trainer(folder, *callbacks, **options):
    return rig.trainer(folder, *callbacks, **{"max_epochs": 1, **options})


@torch.no_grad()
def hooked(batches):
    """What forward hooks see on the modules that the sites mean."""
    model = tiny_model("llama")
    modules = (model.model.layers[1], model.model.layers[0].mlp, model.lm_head)
    found = {str(site): [] for site in SITES}
    for site, module in zip(SITES, modules, strict=True):
        module.register_forward_hook(lambda _m, _a, out, site=site: found[str(site)].append(out.clone()))
    for batch in batches:
        model(batch)
    return found


def check(found, expected):
    assert found.keys() == expected.keys()
    for site, tensors in expected.items():
        assert [tuple(x.shape) for x in found[site]] == [tuple(x.shape) for x in tensors]
        for ours, theirs in zip(found[site], tensors, strict=True):
            torch.testing.assert_close(ours, theirs)


def run(folder, stage, callback, module=Module, kind=L.Trainer, **options):
    ours, it = module(), trainer(folder, callback, kind=kind, **options)
    if stage == "train":
        it.fit(ours, loader())
    else:
        getattr(it, stage)(ours, loader())


@pytest.mark.parametrize("stage", ["train", "validate", "test", "predict"])
def test_one_file_a_batch_with_what_a_hook_sees(tmp_path, stage):
    run(tmp_path, stage, CaptureCallback(SITES, tmp_path / "acts", when=[stage]))
    files = sorted(path.name for path in (tmp_path / "acts").rglob("*") if path.is_file())
    assert files == [f"rank0-batch{i:06d}.safetensors" for i in range(3)]
    check(load_captures(tmp_path / "acts" / stage), hooked(BATCHES))
    with safe_open(tmp_path / "acts" / stage / files[2], "pt") as file:
        assert {key: file.metadata()[key] for key in ("batch", "dataloader")} == {"batch": "2", "dataloader": "0"}


def test_the_other_namespace(tmp_path):
    run(tmp_path, "predict", CaptureCallback(SITES, tmp_path / "acts"), PlModule, pl.Trainer)
    check(load_captures(tmp_path / "acts" / "predict"), hooked(BATCHES))


def test_what_was_read_can_be_used_in_autograd(tmp_path):
    callback = CaptureCallback(SITES[:1], tmp_path / "acts", when=["predict"], limit_batches=0)
    inside = []

    class Look(L.Callback):
        def on_predict_batch_end(self, *_):
            inside.append(callback.capture.activations[SITES[0]])

    trainer(tmp_path, callback, Look()).predict(Module(), loader())
    weight = torch.ones(32, requires_grad=True)
    for x in (*inside, *load_captures_of(tmp_path)):
        (x @ weight).square().sum().backward()
    assert len(inside) == 3
    assert bool(weight.grad.any())


def load_captures_of(folder):
    run(folder, "test", CaptureCallback(SITES[:1], folder / "acts", when=["test"]))
    return load_captures(folder / "acts" / "test")[str(SITES[0])]


def test_positions_and_several_forward_passes(tmp_path):
    callback = CaptureCallback(SITES, tmp_path / "acts", positions=Last())
    trainer(tmp_path, callback).predict(Module(calls=2), loader(BATCHES[:2]))
    expected = hooked([batch + i for batch in BATCHES[:2] for i in (0, 1)])
    check(
        load_captures(tmp_path / "acts" / "predict"),
        {site: [x[:, -1] for x in tensors] for site, tensors in expected.items()},
    )


def test_the_sanity_check_is_not_written_and_the_validation_of_a_fit_is(tmp_path):
    callback = CaptureCallback(SITES[:1], tmp_path / "acts")

    class Look(L.Callback):
        def on_sanity_check_end(self, *_):
            seen.append(list((tmp_path / "acts").rglob("*.safetensors")))

    seen = []
    it = trainer(tmp_path, callback, Look(), num_sanity_val_steps=2)
    it.fit(Module(), loader(), loader(BATCHES[:1]))
    assert seen == [[]]
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["rank0-batch000000.safetensors"]
    assert not (tmp_path / "acts" / "train").exists()
    with safe_open(tmp_path / "acts" / "validate" / "rank0-batch000000.safetensors", "pt") as file:
        assert file.metadata()["global_step"] == "3"


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (1, 1), (2, 2), (9, 3), (None, 3)])
def test_it_stops_after_so_many_batches(tmp_path, limit, count):
    callback = CaptureCallback(SITES, tmp_path / "acts", limit_batches=limit)
    run(tmp_path, "predict", callback)
    assert len(list(tmp_path.rglob("*.safetensors"))) == count
    assert callback.capture.history == {} or limit is not None


def test_several_loaders(tmp_path):
    callback = CaptureCallback(SITES, tmp_path / "acts")
    trainer(tmp_path, callback).test(Module(), [loader(BATCHES[:2]), loader(BATCHES[2:])], verbose=False)
    check(load_captures(tmp_path / "acts" / "test"), hooked([BATCHES[0], BATCHES[2], BATCHES[1]]))


def test_two_processes_write_their_shares(tmp_path):
    four = [torch.arange(8).view(2, 4) + 7 * i for i in range(4)]
    it = trainer(tmp_path, CaptureCallback(SITES, tmp_path / "acts"), devices=2, strategy="ddp_fork")
    it.test(Module(), loader(four), verbose=False)
    names = sorted(path.name for path in (tmp_path / "acts" / "test").iterdir())
    assert names == [f"rank{rank}-batch{i:06d}.safetensors" for rank in (0, 1) for i in (0, 1)]
    check(load_captures(tmp_path / "acts" / "test"), hooked(four))


def test_the_order_is_batch_loader_rank_and_pass(tmp_path):
    places = [(1, 0, 0), (0, 1, 0), (0, 0, 10), (0, 0, 2), (0, 10, 0), (0, 2, 1), (1000000, 0, 0), (999999, 0, 0)]
    for batch, load, rank in places:
        name = f"rank{rank}{f'-loader{load}' if load else ''}-batch{batch:06d}.safetensors"
        tensors = {f"logits/{i}": torch.tensor([batch, load, rank, i]) for i in range(11)}
        save_file(tensors, tmp_path / name)
    (tmp_path / "rank0-batch-notes.safetensors").write_text("somebody's own file")
    found = [tuple(x.tolist()) for x in load_captures(tmp_path)["logits"]]
    assert found == [(*place, i) for place in sorted(places) for i in range(11)]


def test_a_folder_without_captures(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path.name} holds no captured activations"):
        load_captures(tmp_path)
    with pytest.raises(ValueError, match="reads nothing"):
        CaptureCallback([], tmp_path)
