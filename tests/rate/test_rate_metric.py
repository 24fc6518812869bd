"""The metric: the numbers of ``rate_effects``, whatever the batches, processes and repeats."""

from __future__ import annotations

import multiprocessing
import os

import lightning as L
import numpy as np
import pytest
import torch
from rate_oracle import GOLDEN, IDS, random_units
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import RewriteTreatmentEffect, rate_effects
from lightning_interp.rate.estimators.metric import unit_key

STAGES = ("original", "rewrite", "rewrite2")


def rows(data, ids=None):
    """(id, stage, reward, w) of every text."""
    w, *rewards = data
    names = list(range(len(w))) if ids is None else ids
    return [
        (name, stage, float(reward[i]), int(w[i]))
        for stage, reward in zip(STAGES, rewards, strict=True)
        for i, name in enumerate(names)
    ]


def feed(metric, texts, size=7):
    for start in range(0, len(texts), size):
        ids, stages, rewards, w = zip(*texts[start : start + size], strict=True)
        metric.update(list(ids), list(stages), torch.tensor(rewards, dtype=torch.float64), torch.tensor(w))
    return metric


def same(numbers, expected):
    found = {name: float(value) for name, value in numbers.items()}
    assert found == pytest.approx(
        {
            "ate": expected.rate.ate.value,
            "att": expected.rate.att.value,
            "atu": expected.rate.atu.value,
            "ate_se": expected.rate.ate.se,
            "att_se": expected.rate.att.se,
            "atu_se": expected.rate.atu.se,
            "n": expected.counts.n,
            "naive": expected.naive.value,
            "naive_se": expected.naive.se,
            "single": expected.single.ate.value,
            "single_se": expected.single.ate.se,
            "reward_std": expected.reward_std,
        },
        rel=1e-12,
    )


def shuffled(texts, seed=0):
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def test_stages_in_any_batches():
    data = random_units(50)
    metric = feed(RewriteTreatmentEffect(), shuffled(rows(data)))
    same(metric.compute(), rate_effects(*data))
    assert metric.result.rate.ate.method == "paired, t(49)"


def test_whole_stages_as_tensors():
    metric = RewriteTreatmentEffect(se="unpaired")
    w = torch.tensor(GOLDEN["w"], dtype=torch.bool)
    for stage, name in zip(STAGES, ("r_orig", "r_rw", "r_rw2"), strict=True):
        metric.update(torch.arange(7), stage, torch.tensor(GOLDEN[name]).bfloat16(), w)
    same(metric.compute(), rate_effects(**GOLDEN, se="unpaired"))


def test_repeats_count_once():
    data = random_units(40)
    texts = rows(data)
    metric = feed(RewriteTreatmentEffect(), shuffled(texts + texts[::3] + texts[:5]))
    same(metric.compute(), rate_effects(*data))


def test_string_ids_are_the_same_in_every_process():
    metric = feed(RewriteTreatmentEffect(), rows(tuple(map(np.array, GOLDEN.values())), IDS))
    same(metric.compute(), rate_effects(**GOLDEN))
    assert set(metric.result.ids) == {unit_key(name) for name in IDS}
    assert unit_key("t1") == 3550425217839330493  # the first 63 bits of its SHA-256


def test_ids_keep_all_their_bits():
    ids = [2**62 + 1, 2**62 + 2, -(2**63), 2**63 - 1, -1, 0, 2**53 + 1]
    metric = feed(RewriteTreatmentEffect(), rows(tuple(map(np.array, GOLDEN.values())), ids))
    metric.compute()
    assert metric.result.ids == tuple(sorted(ids))
    assert feed(RewriteTreatmentEffect(), [(np.int64(3), "rewrite", 0.0, 1)]).rows[0].tolist()[:2] == [0, 3]


def test_the_order_of_arrival_changes_no_byte():
    noisy = [(i, stage, reward + 1e-9 * k, w) for k in range(2) for i, stage, reward, w in rows(random_units(30))]
    one, other = (feed(RewriteTreatmentEffect(), shuffled(noisy, seed)) for seed in (1, 2))
    assert one.compute() == other.compute()
    assert one.result.to_dict() == other.result.to_dict()


def test_without_originals():
    data = random_units(20)
    metric = feed(RewriteTreatmentEffect(), [row for row in rows(data) if row[1] != "original"])
    assert set(metric.compute()) == {"ate", "att", "atu", "ate_se", "att_se", "atu_se", "n"}


def test_options_reach_the_estimator():
    data = random_units(120)
    metric = feed(RewriteTreatmentEffect(ci="bootstrap", alpha=0.1, n_boot=1000, seed=3), rows(data))
    metric.compute()
    expected = rate_effects(*data, ids=range(120), ci="bootstrap", alpha=0.1, n_boot=1000, seed=3)
    assert metric.result.rate == expected.rate


def test_reset_forgets():
    metric = feed(RewriteTreatmentEffect(), rows(random_units(20)))
    metric.compute()
    metric.reset()
    assert metric.result is None
    with (
        pytest.raises(DataError, match="RewriteTreatmentEffect has no rewards"),
        pytest.warns(UserWarning, match="before"),
    ):
        metric.compute()
    feed(metric, rows(random_units(20, 1)))
    same(metric.compute(), rate_effects(*random_units(20, 1)))


def test_casting_the_module_does_not_cast_the_rewards():
    data = random_units(20)
    module = torch.nn.ModuleDict({"metric": feed(RewriteTreatmentEffect(), rows(data, [2**40 + i for i in range(20)]))})
    for cast in (module.half, module.double, lambda: module.to(torch.bfloat16), lambda: module.to("cpu")):
        cast()
    assert module["metric"].dtype == torch.float64
    same(module["metric"].compute(), rate_effects(*data))


class TestErrors:
    @pytest.mark.parametrize("unit", [1.5, None, True, 2**63, ("a",)])
    def test_no_id(self, unit):
        with pytest.raises(DataError, match=r"Unit id .* is no string and no integer of 64 bits"):
            feed(RewriteTreatmentEffect(), [(unit, "rewrite", 0.0, 1)])

    def test_unknown_stage(self):
        with pytest.raises(
            DataError, match="Stage 'rewrite3' is unknown; expected one of 'original', 'rewrite', 'rewrite2'"
        ):
            feed(RewriteTreatmentEffect(), [(0, "rewrite3", 0.0, 1)])

    @pytest.mark.parametrize("label", [2, -1, float("nan")])
    def test_no_label(self, label):
        with pytest.raises(DataError, match=f"w holds {float(label)}; expected 0 or 1"):
            feed(RewriteTreatmentEffect(), [(0, "rewrite", 0.0, label)])

    @pytest.mark.parametrize("name", ["stage", "rewards", "w"])
    def test_lengths(self, name):
        given = {"ids": [0, 1], "stage": ["rewrite"] * 2, "rewards": torch.zeros(2), "w": torch.ones(2)}
        with pytest.raises(DataError, match=f"{name} has 1 values, but ids has 2"):
            RewriteTreatmentEffect().update(**{**given, name: given[name][:1]})

    @pytest.mark.parametrize("name", ["rewards", "w"])
    def test_two_axes(self, name):
        given = {"ids": [0, 1], "stage": "rewrite", "rewards": torch.zeros(2), "w": torch.ones(2)}
        with pytest.raises(DataError, match=rf"{name} has the shape \[2, 1\]; expected one axis"):
            RewriteTreatmentEffect().update(**{**given, name: given[name][:, None]})

    def test_an_update_that_fails_leaves_nothing(self):
        metric = RewriteTreatmentEffect()
        with pytest.raises(DataError):
            metric.update([0, 1.5], "rewrite", torch.zeros(2), torch.ones(2))
        assert metric.rows == []

    def test_one_id_for_two_units(self):
        data = random_units(20)
        with pytest.raises(DataError, match="1 unit ids came with labels of both arms: 7"):
            feed(RewriteTreatmentEffect(), [*rows(data), (7, "rewrite", 0.0, 1 - int(data[0][7]))]).compute()
        with pytest.raises(DataError, match=r"1 unit ids came with rewards of one stage over \d\.\d+ apart: 3"):
            feed(RewriteTreatmentEffect(), [*rows(data), (3, "rewrite", 99.0, int(data[0][3]))]).compute()
        lenient = feed(RewriteTreatmentEffect(tolerance=1e9), [*rows(data), (3, "rewrite", 99.0, int(data[0][3]))])
        same(lenient.compute(), rate_effects(*data))

    def test_a_reward_that_never_came(self):
        texts = [row for row in rows(random_units(20)) if row[:2] != (5, "rewrite2")]
        with pytest.raises(DataError, match=r"1 of 20 units are incomplete \(1 missing_rewrite2\): 5"):
            feed(RewriteTreatmentEffect(), texts).compute()
        metric = feed(RewriteTreatmentEffect(missing="drop"), texts)
        with pytest.warns(UserWarning, match="were left out"):
            assert metric.compute()["n"] == 19

    def test_a_reward_that_is_not_finite(self):
        texts = [*rows(random_units(20)), (5, "rewrite2", float("nan"), int(random_units(20)[0][5]))]
        with pytest.raises(DataError, match=r"1 of 20 units are incomplete \(1 nonfinite\): 5"):
            feed(RewriteTreatmentEffect(), texts).compute()

    def test_clusters_are_not_gathered(self):
        with pytest.raises(RecipeError, match="RewriteTreatmentEffect has se='cluster', but it gathers no clusters"):
            RewriteTreatmentEffect(se="cluster")

    def test_options_are_checked_at_once(self):
        with pytest.raises(RecipeError, match="missing='skip' is unknown"):
            RewriteTreatmentEffect(missing="skip")


def in_two_processes(work, *arguments):
    """Run ``work(rank, *arguments)`` on two gloo ranks and return what each gave."""
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), os.environ["MASTER_PORT"]

    def rank_main(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        try:
            results.put((rank, work(rank, *arguments)))
        finally:
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    return found


def compute_share(rank, shares):
    metric = feed(RewriteTreatmentEffect().to("cpu"), shares[rank])
    numbers = {name: float(value) for name, value in metric.compute().items()}
    return numbers, metric.result.to_dict(), len(metric.rows)


@pytest.mark.parametrize("split", ["stages apart", "padded", "all on one"])
def test_two_processes(split):
    data = random_units(41)
    texts = shuffled(rows(data, [f"unit {i}" for i in range(41)]))
    shares = {
        "stages apart": ([t for t in texts if t[1] != "rewrite"], [t for t in texts if t[1] == "rewrite"]),
        "padded": (texts[0::2], texts[1::2] + texts[:3]),  # a sampler repeats the first rows to fill its last batch
        "all on one": (texts, []),
    }[split]
    found = in_two_processes(compute_share, shares)
    expected = rate_effects(*data)
    for rank, (numbers, plain, kept) in found.items():
        same(numbers, expected)
        assert plain == found[0][1]
        assert kept == -(-len(shares[rank]) // 7)  # a rank keeps its own rewards after the exchange


class Scorer(L.LightningModule):
    """Validates on texts that are numbers: the reward is the number."""

    def __init__(self, path):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.effect = RewriteTreatmentEffect()
        self.path = path

    def validation_step(self, batch, batch_idx):
        ids, stages, rewards, w = batch
        self.effect.update(ids, [STAGES[stage] for stage in stages], rewards, w)

    def on_validation_epoch_end(self):
        self.log_dict({f"rate/test/{name}": value for name, value in self.effect.compute().items()})
        (self.path / f"rank{self.global_rank}").write_text(str(float(self.effect.result.rate.ate.value)))
        self.effect.reset()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lightning_on_two_processes(tmp_path, precision):
    data = random_units(35)  # 105 texts on two ranks: the sampler repeats one
    ids, stages, rewards, w = zip(*rows(data), strict=True)
    columns = (
        torch.tensor(ids),
        torch.tensor([STAGES.index(stage) for stage in stages]),
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(w),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(Scorer(tmp_path), DataLoader(TensorDataset(*columns), batch_size=8), verbose=False)
    expected = rate_effects(*data)
    held = float(trainer.callback_metrics["rate/test/ate"])
    assert held == pytest.approx(expected.rate.ate.value, rel=1e-2 if precision == "bf16-true" else 1e-6)
    if precision == "32-true":
        for rank in range(2):
            ate = float((tmp_path / f"rank{rank}").read_text())
            assert ate == pytest.approx(expected.rate.ate.value, rel=1e-12)
