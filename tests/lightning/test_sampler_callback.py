"""Writing in the middle of somebody's run: the callback's intervention acts, and the run does not notice."""

from __future__ import annotations

import lightning as L
import torch

from lightning_interp import Intervention, InterventionCallback, Site
from lightning_interp.generation import LocalSampler, TextRequest
from lightning_interp.testing import byte_tokenizer, tiny_model

REQUESTS = [TextRequest.chat(text, max_new_tokens=5) for text in ("a", "A longer text.", "Zoë!")]


class Push(Intervention):
    def sites(self, model_map):
        return [Site("resid_post", 1)]

    def transform(self, site, x, step):
        return x + 5.0 * torch.arange(x.shape[-1], dtype=x.dtype).sin()


class Module(L.LightningModule):
    def __init__(self, writes):
        super().__init__()
        self.model, self.writes, self.texts = tiny_model("gpt2", resid_pdrop=0.1), writes, []

    def training_step(self, batch, _):
        return self.model(batch).logits.logsumexp(-1).mean()

    def validation_step(self, batch, _):
        if self.writes:
            self.texts.append(LocalSampler(self.model, byte_tokenizer(), batch_size=2).generate(REQUESTS))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(folder, writes):
    L.seed_everything(0, verbose=False)
    module, data = Module(writes), torch.utils.data.DataLoader(torch.arange(24).reshape(4, 6), batch_size=2)
    L.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=1,
        callbacks=[InterventionCallback(Push(), when="validate")],
    ).fit(module, data, data)  # fmt: skip
    return module


def test_texts_in_a_validation_are_steered_and_the_training_is_as_without(tmp_path):
    module, quiet = fitted(tmp_path / "a", True), fitted(tmp_path / "b", False)
    assert len(module.texts) == 2
    sampler = LocalSampler(module.model, byte_tokenizer())
    with Push().attach(module.model):
        steered = sampler.generate(REQUESTS)
    assert module.texts[-1] == steered != sampler.generate(REQUESTS)
    for one, other in zip(module.parameters(), quiet.parameters(), strict=True):
        assert torch.equal(one, other)
