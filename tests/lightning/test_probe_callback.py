"""Class means that a run leaves, against means over states that plain hooks see."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import pytorch_lightning as pl
import rig
import torch

from lightning_interp import Last, Site
from lightning_interp.core.model.fingerprint import model_fingerprint
from lightning_interp.errors import DataError, IncompatibleModelError, PositionError, RecipeError, SiteError
from lightning_interp.steering.concepts.class_reader import ClassReader, PredictedSide
from lightning_interp.steering.concepts.moments import ClassMoments
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.concepts.probe_callback import ProbeCallback
from lightning_interp.steering.concepts.probes import ConceptProbe
from lightning_interp.testing import CallbackContract, tiny_model

PAIRS = CounterfactualPairs([(i, i + 120) for i in range(10, 120)])
RULE = PredictedSide(PAIRS, top_k=2, min_mass=0.02)
"""Loose, so that a model of random weights has contexts of both sides."""


def body(base):
    class Module(base):
        """Runs the model once a step."""

        def __init__(self, family="llama", **call):
            super().__init__()
            self.model, self.call = tiny_model(family), call

        def run(self, batch):
            return self.model(batch["input_ids"], attention_mask=batch["attention_mask"], **self.call).logits.mean()

        def training_step(self, batch, batch_idx):
            return self.run(batch)

        def validation_step(self, batch, batch_idx):
            self.run(batch)

        def test_step(self, batch, batch_idx):
            self.run(batch)

        def predict_step(self, batch, batch_idx):
            self.run(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return Module


Module, PlModule = body(L.LightningModule), body(pl.LightningModule)


class Rows(torch.utils.data.Dataset):
    """Padded texts with a class and a number each."""

    def __init__(self, n=7, length=9, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, 261, (n, length), generator=rng)
        self.pad = torch.randint(0, length - 1, (n,), generator=rng)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = (torch.arange(self.ids.shape[1]) >= self.pad[i]).long()
        return {"input_ids": self.ids[i], "attention_mask": mask, "concept": i % 2, "index": 10 + i}


def loader(rows, size=3):
    return torch.utils.data.DataLoader(rows, batch_size=size)


def trainer(folder, *callbacks, **options):
    return rig.trainer(folder, *callbacks, **{"max_epochs": 1, **options})


@torch.no_grad()
def states(rows, model=None, layer=None):
    """Of every row: states of its real tokens at the head's input (or after a block), and log-probabilities there."""
    model = model or tiny_model("llama")
    found = []
    for i in range(len(rows)):
        row = rows[i]
        seen = {}
        handles = [
            model.lm_head.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(head=args[0][0])),
            model.model.layers[2].register_forward_hook(lambda _, __, out, seen=seen: seen.update(block=out[0])),
        ]
        log_p = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        real = row["attention_mask"].bool()
        found.append(((seen["head"] if layer is None else seen["block"])[real].double(), log_p[real].double()))
    return found


def check(moments, base, target, phi=None, tolerance=2e-5):
    assert moments.counts == (len(base), len(target))
    for name, rows in (("base", base), ("target", target)):
        np.testing.assert_allclose(moments.mean(name), torch.stack(rows).mean(0), atol=tolerance)
    if phi is not None:
        for name, rows in zip(("base", "target"), phi, strict=True):
            np.testing.assert_allclose(moments.dual_mean(name), torch.stack(rows).mean(0), atol=tolerance)


def split(rows, choose, layer=None):
    """States and dual coordinates by class, one list each; ``choose(row, log_p)`` gives the class of a token."""
    weight = tiny_model("llama").lm_head.weight.detach().double()
    lam, phi = ([], []), ([], [])
    for i, (lams, logs) in enumerate(states(rows, layer=layer)):
        for state, log_p in zip(lams, logs, strict=True):
            label = choose(i, log_p)
            if label >= 0:
                lam[label].append(state)
                phi[label].append(log_p.exp() @ weight)
    return lam, phi


def side(_, log_p):
    top = log_p.topk(2)
    sides = {0 if 10 <= t < 120 else 1 if 130 <= t < 240 else -1 for t in top.indices.tolist()}
    return sides.pop() if len(sides) == 1 and float(top.values.exp().sum()) > 0.02 else -1


class TestContract(CallbackContract):
    """Where the model's prediction at one site tells the class of a state at another."""

    libraries = ("pytorch_lightning",)

    def make_callback(self):
        return ProbeCallback(RULE, self.folder / "probes", site=Site("resid_post", 1))


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_classes_from_the_batch(tmp_path, stage):
    rows = Rows()
    callback = ProbeCallback("concept", tmp_path / "probes", scatter=True)
    getattr(trainer(tmp_path, callback), stage)(Module(), loader(rows))
    lam, phi = split(rows, lambda row, _: row % 2)
    check(callback.moments[stage], *lam, phi)
    probe = callback.probe()
    expected = torch.stack(phi[1]).mean(0) - torch.stack(phi[0]).mean(0)
    np.testing.assert_allclose(probe.direction, expected, atol=2e-5)
    assert probe.fingerprint == model_fingerprint(tiny_model("llama"))
    assert (probe.n_base, probe.n_target) == callback.moments[stage].counts
    folder = tmp_path / "probes" / stage
    assert sorted(p.name for p in folder.iterdir()) == [
        *("dual_md.safetensors", "lda.safetensors", "moments.safetensors", "primal_md.safetensors")
    ]
    for kind in ("dual_md", "primal_md", "lda"):
        again = ConceptProbe.load(folder / f"{kind}.safetensors", model=tiny_model("llama"))
        assert torch.equal(again.direction, callback.probe(kind).direction)
        assert again.kind == kind


def test_the_other_namespace(tmp_path):
    callback = ProbeCallback("concept")
    trainer(tmp_path, callback, kind=pl.Trainer).predict(PlModule(), loader(Rows()))
    check(callback.moments["predict"], *split(Rows(), lambda row, _: row % 2)[0])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_classes_of_tokens(tmp_path):
    class Tokens(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "concept": torch.where(row["input_ids"] % 3 == 0, -1, row["input_ids"] % 2)}

    rows = Tokens()
    callback = ProbeCallback("concept")
    trainer(tmp_path, callback).predict(Module(), loader(rows))
    real = [rows[i]["concept"][rows[i]["attention_mask"].bool()].tolist() for i in range(len(rows))]
    flat = iter([label for labels in real for label in labels])
    check(callback.moments["predict"], *split(rows, lambda *_: next(flat))[0])


def test_classes_from_the_models_own_prediction(tmp_path):
    rows = Rows(n=20)
    callback = ProbeCallback(RULE)
    trainer(tmp_path, callback).predict(Module(), loader(rows))
    lam, phi = split(rows, side)
    assert min(map(len, lam)) >= 3
    check(callback.moments["predict"], *lam, phi)


def test_pairs_alone_are_the_rule_of_the_paper():
    reader = ClassReader(PAIRS)
    assert reader.classes == PredictedSide(PAIRS, top_k=3, min_mass=0.7)


def test_states_of_another_site_for_the_same_contexts(tmp_path):
    rows = Rows(n=20)
    callback = ProbeCallback(RULE, site=Site("resid_post", 2))
    trainer(tmp_path, callback).predict(Module(), loader(rows))
    check(callback.moments["predict"], *split(rows, side, layer=2)[0], tolerance=1e-4)
    assert callback.probe("primal_md").site == Site("resid_post", 2)
    with pytest.raises(RecipeError, match="hold no dual coordinates"):
        callback.probe("dual_md")


@pytest.mark.parametrize(
    ("classes", "site"), [(RULE, Site("unembed_in")), ("concept", Site("resid_post", 2)), (RULE, Site("resid_post", 2))]
)
def test_a_model_that_is_asked_for_the_last_logits(tmp_path, classes, site):
    rows = Rows(n=20)
    callback = ProbeCallback(classes, positions=Last(), site=site)
    trainer(tmp_path, callback).predict(Module(logits_to_keep=1), loader(rows))
    whole = ProbeCallback(classes, positions=Last(), site=site)
    trainer(tmp_path, whole).predict(Module(), loader(rows))
    assert callback.moments["predict"].counts == whole.moments["predict"].counts
    assert sum(whole.moments["predict"].counts) == 20 or classes is RULE
    torch.testing.assert_close(callback.moments["predict"].mean("base"), whole.moments["predict"].mean("base"))


@pytest.mark.parametrize("stage", ["predict"])
def test_two_processes(tmp_path, stage):
    rows = Rows(n=7)
    callback = ProbeCallback("concept", tmp_path / "probes", ids="index")
    it = trainer(tmp_path, callback, devices=2, strategy="ddp_fork", use_distributed_sampler=True)
    options = {"return_predictions": False} if stage == "predict" else {"verbose": False}
    getattr(it, stage)(Module(), loader(rows, size=2), **options)
    assert callback.moments == {}  # it was counted in other processes
    lam, phi = split(rows, lambda row, _: row % 2)
    check(ClassMoments.load(tmp_path / "probes" / stage / "moments.safetensors"), *lam, phi)
    probe = callback.probe("dual_md")
    assert torch.equal(
        probe.direction, ConceptProbe.load(tmp_path / "probes" / stage / "dual_md.safetensors").direction
    )


def test_without_ids_a_padded_row_counts_twice(tmp_path):
    rows = Rows(n=7)
    callback = ProbeCallback("concept", tmp_path / "probes")
    trainer(tmp_path, callback, devices=2, strategy="ddp_fork").test(Module(), loader(rows, size=2), verbose=False)
    counts = ClassMoments.load(tmp_path / "probes" / "test" / "moments.safetensors").counts
    lam, _ = split(rows, lambda row, _: row % 2)
    assert counts == (len(lam[0]) + int(rows[0]["attention_mask"].sum()), len(lam[1]))


def test_validation_of_a_fit_is_that_of_its_last_epoch(tmp_path):
    rows = Rows()
    callback = ProbeCallback("concept", when=["validate"])
    seen = []

    class Look(L.Callback):
        def on_sanity_check_end(self, *_):
            seen.append(dict(callback.moments))

        def on_train_batch_start(self, *_):
            assert not callback.attached

        def on_validation_end(self, it, module):
            if not it.sanity_checking:
                seen.append((model_fingerprint(module), dict(callback.moments)))

    module = Module()
    trainer(tmp_path, callback, Look(), max_epochs=2, num_sanity_val_steps=1).fit(module, loader(rows), loader(rows))
    sanity, first, second = seen
    assert sanity == {}
    assert first[1]["validate"].counts == second[1]["validate"].counts
    assert not torch.equal(first[1]["validate"].mean("base"), second[1]["validate"].mean("base"))
    assert [found["validate"].fingerprint for _, found in (first, second)] == [first[0], second[0]]
    assert first[0] != second[0]


def test_mixed_precision_is_read_in_float32(tmp_path):
    rows = Rows()
    callback = ProbeCallback("concept")
    trainer(tmp_path, callback, precision="bf16-mixed").predict(Module(), loader(rows))
    lam, phi = split(rows, lambda row, _: row % 2)
    check(callback.moments["predict"], *lam, phi, tolerance=0.1)
    assert callback.moments["predict"].mean("base").dtype == torch.float64


def test_memory_of_the_callback_does_not_grow(tmp_path):
    import pickle

    sizes = []
    for n in (4, 16):
        callback = ProbeCallback("concept")
        trainer(tmp_path, callback).predict(Module(), loader(Rows(n=n)))
        sizes.append(len(pickle.dumps(callback.moments)))
    assert sizes[0] == pytest.approx(sizes[1], abs=16)


def test_a_class_without_contexts_warns_and_says_so_when_asked(tmp_path):
    class OneSided(Rows):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "concept": 0}

    folder = tmp_path / "probes" / "predict"
    callback = ProbeCallback("concept", tmp_path / "probes")
    trainer(tmp_path, callback).predict(Module(), loader(Rows()))
    assert (folder / "dual_md.safetensors").exists()
    with pytest.warns(UserWarning, match=r"made no primal_md or dual_md probe of predict: There is no target state"):
        trainer(tmp_path, callback).predict(Module(), loader(OneSided()))
    assert [p.name for p in folder.iterdir()] == ["moments.safetensors"]  # no probe of the run before
    with pytest.raises(DataError, match=r"There is no target state, .*: \d+ base and 0 target"):
        callback.probe()


def test_generation_is_read_token_by_token():
    model, ids = tiny_model("llama"), torch.arange(10, 16).view(2, 3)
    reader = ClassReader("concept", ids="index")
    with reader.attach(model) as attachment:
        attachment.batch = {"concept": torch.tensor([0, 1]), "index": torch.tensor([3, 4])}
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert reader.moments.counts == (4, 4)  # generate asks the head for the last token of each pass
    assert reader._geometry is None


class TestErrors:
    def predict(self, folder, callback, rows=None, **module):
        trainer(folder, callback).predict(Module(**module), loader(Rows() if rows is None else rows))

    def test_training_is_not_read(self):
        with pytest.raises(RecipeError, match=r"ProbeCallback\(when=\('train', 'validate'\)\): weights move"):
            ProbeCallback("concept", when=["train", "validate"])
        with pytest.raises(RecipeError, match=r"when=\('never',\)"):
            ProbeCallback("concept", when=["never"])

    @pytest.mark.parametrize("options", [{"site": Site("logits")}, {"site": Site("resid_post", 1), "dual": True}])
    def test_sites_that_hold_no_such_state(self, options):
        with pytest.raises(RecipeError, match=rf"ClassReader\(site={options['site']}, dual="):
            ProbeCallback("concept", **options)

    def test_rules_that_make_no_sense(self):
        for options in ({"top_k": 0}, {"min_mass": 1.0}):
            with pytest.raises(RecipeError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
                PredictedSide(PAIRS, **options)

    def test_positions_that_choose_nothing(self):
        from lightning_interp import Tokens

        with pytest.raises(PositionError, match="ClassReader"):
            ProbeCallback("concept", positions=Tokens(()))

    def test_a_batch_without_the_class(self, tmp_path):
        with pytest.raises(DataError, match="no entry 'kind'; it holds: input_ids, attention_mask, concept, index"):
            self.predict(tmp_path, ProbeCallback("kind"))
        with pytest.raises(DataError, match="no entry 'number'"):
            self.predict(tmp_path, ProbeCallback("concept", ids="number"))
        reader, model = ClassReader("concept"), tiny_model("llama")
        with reader.attach(model), pytest.raises(DataError, match="'concept'; it holds: nothing"):
            model(torch.arange(3)[None])

    def test_entries_of_another_shape(self, tmp_path):
        class Wrong(Rows):
            def __getitem__(self, i):
                return {**super().__getitem__(i), "concept": torch.zeros(5), "index": 0.5}

        with pytest.raises(DataError, match=r"classes 'concept' have the shape \[3, 5\], but the pass has 3 rows of 9"):
            self.predict(tmp_path, ProbeCallback("concept"), Wrong())
        rule = PredictedSide(PAIRS, min_mass=0.0)
        with pytest.raises(DataError, match=r"ids 'index' are torch\.float64 \[3\]; expected 3 integers"):
            self.predict(tmp_path, ProbeCallback(rule, ids="index"), Wrong())

    def test_a_class_that_is_none(self, tmp_path):
        with pytest.raises(RecipeError, match="A label is 12; expected 0"):
            self.predict(tmp_path, ProbeCallback("index"))

    def test_nothing_was_read(self, tmp_path):
        with pytest.raises(
            RecipeError, match=r"no moments of stage None\. Stages that were read: none, so run one first"
        ):
            ProbeCallback("concept").probe()
        callback = ProbeCallback("concept", tmp_path / "probes")
        self.predict(tmp_path, callback)
        trainer(tmp_path, callback).validate(Module(), loader(Rows()), verbose=False)
        with pytest.raises(RecipeError, match=r"no moments of stage None\. Stages that were read: predict, validate"):
            callback.probe()
        with pytest.raises(RecipeError, match="no moments of stage 'test'"):
            callback.probe(stage="test")
        assert callback.probe(stage="validate").kind == "dual_md"
        with pytest.warns(UserWarning, match="or dual_md probe of predict: There is no base state"):
            self.predict(tmp_path, ProbeCallback(PredictedSide(PAIRS, min_mass=0.999)))

    def test_a_module_that_does_not_run_its_model(self, tmp_path):
        class Idle(Module):
            def run(self, batch):
                pass

        callback = ProbeCallback("concept")
        with pytest.warns(UserWarning, match="read no token during predict"):
            trainer(tmp_path, callback).predict(Idle(), loader(Rows()))
        assert callback.moments == {}

    def test_models_that_have_no_such_state(self, tmp_path):
        with pytest.raises(IncompatibleModelError, match="caps its logits"):
            self.predict(tmp_path, ProbeCallback("concept"), family="gemma2")
        callback = ProbeCallback("concept", on_softcap="ignore")
        self.predict(tmp_path, callback, family="gemma2")
        assert min(callback.moments["predict"].counts) > 0
        plain = ProbeCallback(RULE, dual=False)
        self.predict(tmp_path, plain, family="gemma2")  # no dual coordinate is wanted
        with pytest.raises(SiteError, match="layer 9"):
            self.predict(tmp_path, ProbeCallback("concept", site=Site("resid_post", 9)))
