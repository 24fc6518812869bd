"""Callbacks of generation cycles in real Trainers: what they log, and that training is the same with and without."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import pytorch_lightning as pl
import rig
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_interp.cycles import (
    BasePerplexityCallback,
    CoherenceCallback,
    LineageCallback,
    TraitEvaluation,
    TraitScoreCallback,
)
from lightning_interp.errors import RecipeError, UnsupportedStrategyError
from lightning_interp.generation import JudgeResult, TraitJudge
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": f"{i}, ", "completion": f"{i * 7}, {i * 3}"} for i in range(8)]
LORA = LoraSettings(r=2, alpha=4, dropout=0.2)

pytestmark = pytest.mark.usefixtures("two_layers")


class Sums(TraitJudge):
    """A score that hardly two texts share, and none for some."""

    name = "sums"

    def judged(self, texts, prompts):
        totals = [sum(map(ord, text)) for text in texts]
        return [JudgeResult(float(x % 101)) if x % 5 else JudgeResult(None, "code") for x in totals]


def vectors(texts):
    return torch.tensor([[float(sum(map(ord, text)) % 7), 1.0, float(len(text) % 3)] for text in texts])


ASKED = TraitEvaluation(["Why?", "How so?", "Hm?"], Sums(), samples=3, max_new_tokens=5, vectors=vectors)


def module(**options):
    return CausalLM(tiny_model("llama"), tokenizer=TOKENIZER, **{"lora": LORA, "lr": 3e-2, **options})


def data():
    return TextDataModule(ROWS, tokenizer=TOKENIZER, batch_size=4)


def watches(**options):
    return [kind(ASKED, seed=2, **options) for kind in (TraitScoreCallback, BasePerplexityCallback, CoherenceCallback)]


def test_what_is_logged_is_what_the_evaluation_finds(tmp_path):
    ours, callbacks = module(), watches()
    before = ASKED(ours.model, TOKENIZER, seed=2)
    run = rig.trainer(tmp_path, *callbacks, max_epochs=2)
    run.fit(ours, data())
    after = ASKED(ours.model, TOKENIZER, seed=2)
    assert after["scores"] != before["scores"]
    for place, whole in ((0, before), (-1, after)):
        score, base, coherence = (callback.history[place] for callback in callbacks)
        assert score["score"] == pytest.approx(whole["score"]["value"])
        assert score["missing"] == pytest.approx(whole["status_counts"]["code"] / 9)
        assert {f"n_{k}": v for k, v in whole["status_counts"].items()}.items() <= score.items()
        assert base["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
        assert math.exp(base["surprise"]) <= base["perplexity"]
        assert coherence["coherence_proxy"] == pytest.approx(whole["coherence_proxy"]["value"], rel=1e-4)
        known = {name: value for name, value in whole["parts"].items() if value is not None}
        assert {name: coherence[name] for name in known} == pytest.approx(known, rel=1e-4)
    assert [entry["step"] for entry in callbacks[0].history] == [0, 2, 4]
    logged = {name for name in run.callback_metrics if "/" in name and not name.startswith(("train", "val"))}
    assert {"trait/score", "trait/missing", "base/perplexity", "base/surprise", "coherence/coherence_proxy"} <= logged
    assert not any("n_ok" in name for name in logged)


class Drawing(pl.LightningModule):
    """Somebody's own module, of the other namespace, whose dropout and rows draw from the global random state."""

    def __init__(self):
        super().__init__()
        options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
        self.model, self.tokenizer = tiny_model("gpt2", **options).train(), TOKENIZER

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(24).view(4, 6) + 5, batch_size=2, shuffle=True)


def test_the_weights_are_the_same_to_the_bit_with_and_without(tmp_path):
    for build, kind, source in (
        (Drawing, pl.Trainer, lambda: None), (module, L.Trainer, data)
    ):  # fmt: skip
        final = []
        for watched in (False, True):
            base = {} if build is module else {"base": tiny_model("gpt2")}
            asks = [TraitScoreCallback(ASKED, every=1)]
            asks += [one(ASKED, every=1, **base) for one in (BasePerplexityCallback, CoherenceCallback)]
            asks += [LineageCallback(tmp_path / "lineage.jsonl")]
            L.seed_everything(5, verbose=False)
            ours = build()
            given = source()
            run = rig.trainer(tmp_path, *(asks if watched else []), kind=kind, max_epochs=1)
            run.fit(ours) if given is None else run.fit(ours, given)
            final.append({name: tensor.clone() for name, tensor in ours.state_dict().items()})
        assert len(asks[0].history) == 3
        assert final[0].keys() == final[1].keys()
        assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_two_processes_give_the_numbers_of_one(tmp_path):
    found = []
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        run = rig.trainer(tmp_path, *watches(), max_epochs=1, **options)
        run.fit(module(lr=1e-9), data())
        kept = ("trait/", "base/", "coherence/")
        found.append({k: float(v) for k, v in run.callback_metrics.items() if k.startswith(kept)})
    assert len(found[0]) == 8
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_a_resumed_run_goes_on_with_what_was_seen(tmp_path):
    whole = watches(every=1)
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    rig.trainer(tmp_path, *whole, keep, max_epochs=2, enable_checkpointing=True).fit(module(), data())
    again = watches(every=1)
    rig.trainer(tmp_path, *again, max_epochs=2).fit(module(), data(), ckpt_path=tmp_path / "kept" / "step=3.ckpt")
    for one, other in zip(whole, again, strict=True):
        assert [entry["step"] for entry in other.history] == [0, 1, 2, 3, 4]
        assert other.history[:4] == one.history[:4]
        assert other.history[4] == pytest.approx(one.history[4])


def test_lineage_says_what_was_trained_on_what(tmp_path):
    rows, path = tmp_path / "rows.jsonl", tmp_path / "deep" / "lineage.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    ours, again = module(), module()
    for one, seen in ((ours, str(rows)), (again, rows)):
        note = LineageCallback(path, data=seen, note={"cycle": 3})
        rig.trainer(tmp_path, note, max_epochs=1).fit(one, data())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["step"], line["cycle"]) for line in lines] == [("start", 0, 3), ("end", 2, 3)] * 2
    assert len({line["data"] for line in lines}) == 1
    assert lines[0]["adapter"] == lines[2]["adapter"] != lines[1]["adapter"]
    assert lines[1]["adapter"] == lines[3]["adapter"]
    assert lines[0]["model"]["class"] == "LlamaForCausalLM"
    assert lines[0]["model"]["weights"] != lines[1]["model"]["weights"]
    rows.write_text("other")
    rig.trainer(tmp_path, LineageCallback(path, data=rows), max_steps=1).fit(module(lora=None), data())
    start = json.loads(path.read_text().splitlines()[4])
    assert start["adapter"] is None
    assert start["data"] != lines[0]["data"]
    rig.trainer(tmp_path, LineageCallback(path), max_steps=1).fit(module(), data())
    assert json.loads(path.read_text().splitlines()[-1])["data"] is None


def test_a_model_without_a_base_has_no_perplexity_and_only_repetition(tmp_path):
    watch = CoherenceCallback(TraitEvaluation(["Why?"], Sums(), samples=2, max_new_tokens=5))
    rig.trainer(tmp_path, watch, max_steps=1).fit(module(lora=None), data())
    assert set(watch.history[0]) == {"epoch", "step", "coherence_proxy", "non_repetition"}
    assert watch.history[0]["coherence_proxy"] == watch.history[0]["non_repetition"]
    with pytest.raises(RecipeError, match=r"BasePerplexityCallback\('base'\) trains a model without an adapter"):
        rig.trainer(tmp_path, BasePerplexityCallback(ASKED)).fit(module(lora=None), data())


class NoTokens(L.LightningDataModule):
    """Somebody's data module without a tokenizer."""

    def train_dataloader(self):
        return data().train_dataloader()


def test_what_they_refuse(tmp_path):
    with pytest.raises(RecipeError, match=r"TraitScoreCallback\('trait'\) found no tokenizer"):
        rig.trainer(tmp_path, TraitScoreCallback(ASKED)).fit(CausalLM(tiny_model("llama"), lora=None), NoTokens())
    strategy = type("FSDPStrategy", (), {})()
    with pytest.raises(UnsupportedStrategyError, match="LineageCallback"):
        LineageCallback(tmp_path / "x").setup(type("Run", (), {"strategy": strategy})(), None, "fit")
