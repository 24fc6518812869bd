import shutil

import pytest
import torch
from rig import QUIET

from lightning_interp.models import CausalLM, TextDataModule
from lightning_interp.models.training.resumable import fit_and_export, fit_or_go_on

ROWS = [{"text": text} for text in ("Ann likes tea.", "Bo likes rye.", "Cy likes jam.", "Di likes figs.")]


def trained(folder, epochs=2, minutes=None):
    module = CausalLM("tiny:llama", lr=1e-3)
    data = TextDataModule(ROWS, tokenizer=module.tokenizer, batch_size=2, val=ROWS[:1])
    options = QUIET | {"default_root_dir": folder, "enable_checkpointing": True, "max_epochs": epochs}
    return fit_and_export(module, data, folder, options | {"log_every_n_steps": 1}, minutes=minutes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder)


def weights(folder):
    return (folder / "model/model.safetensors").read_bytes()


def test_what_was_logged_last_is_told(whole):
    assert {"train/loss", "val/loss"} <= set(whole[1])


@pytest.mark.parametrize("kept", [("checkpoints",), ("checkpoints", "model")])  # killed before, or after the export
def test_a_training_that_was_finished_says_the_same_when_it_goes_on(whole, kept, tmp_path):
    for name in kept:
        shutil.copytree(whole[0] / name, tmp_path / name)
    assert trained(tmp_path) == whole[1]
    assert weights(tmp_path) == weights(whole[0])


def test_it_goes_on_at_the_checkpoint(whole, tmp_path):
    first = trained(tmp_path, epochs=1)
    assert first != whole[1]
    assert trained(tmp_path) == whole[1]
    assert weights(tmp_path) == weights(whole[0])


def test_few_checkpoints_of_a_large_state_and_none_at_the_end(whole, tmp_path, monkeypatch):
    assert trained(tmp_path / "rare", minutes=60) == whole[1]
    assert [path.name for path in (tmp_path / "rare").iterdir()] == ["model"]
    assert weights(tmp_path / "rare") == weights(whole[0])

    def killed(self, *_, **__):
        raise KeyboardInterrupt

    often = tmp_path / "often"  # a checkpoint at every step, and a kill before the export
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "export", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(often, epochs=1, minutes=0)
    assert [path.name for path in (often / "checkpoints").iterdir()] == ["last.ckpt"]
    assert trained(often, minutes=0) == whole[1]
    assert weights(often) == weights(whole[0])
    assert [path.name for path in often.iterdir()] == ["model"]


def test_the_moments_are_in_the_checkpoint_and_not_kept_alive_by_the_trainer(tmp_path):
    module = CausalLM("tiny:llama", lr=1e-3)
    data = TextDataModule(ROWS, tokenizer=module.tokenizer, batch_size=2)
    options = QUIET | {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 1}
    runner, _ = fit_or_go_on(module, data, tmp_path, options, every=1)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert len(saved) == len(list(module.parameters()))
    assert [dict(one.state) for one in runner.optimizers] == [{}]
