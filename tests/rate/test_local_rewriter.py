from __future__ import annotations

import pytest
from rewriting import ATTR, store_of

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import FunctionGenerator, LocalSampler, TextRequest
from lightning_interp.rate.rewriting.chat_rewriters import LocalRewriter, TemplateRewriter
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.records import text_sha
from lightning_interp.rate.rewriting.rewriters import rewriter_id
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.rewriting.templates import RewriteTemplate, rewrite_template
from lightning_interp.testing import byte_tokenizer, needs, tiny_model

PLAIN = RewriteTemplate(name="plain", version=1, body="{phrase}: {text}{prompt}", phrases=("no", "yes"))
TEXTS = ["a", "A fine film.", "Zoë!", "A rather longer text, which needs more room than the others do.", "\n"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def make(model, tokenizer):
    def build(**options):
        loaded = {"tokenizer": tokenizer, "name": "tiny", "max_new_tokens": 6, **options}
        return LocalRewriter(options.pop("model", model), PLAIN, **{k: v for k, v in loaded.items() if k != "model"})

    return build


def ask(rewriter, texts, *, targets=None, **more):
    return rewriter.rewrite(list(texts), [""] * len(texts), targets or [1] * len(texts), **more)


class TestAnswers:
    @pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.6, "seed": 7}])
    def test_they_are_the_samplers_texts_without_space_around_them(self, make, model, tokenizer, options):
        """Keyed by text, prompt, target and draw."""
        rewriter = make(batch_size=3, **options)
        requests = [
            TextRequest.chat(
                f"yes: {text}p", max_new_tokens=6, key=("rewrite", text_sha(text), text_sha("p"), 1, 2),
                **{"temperature": 0.7, **options},
            )
            for text in TEXTS
        ]  # fmt: skip
        written = LocalSampler(model, tokenizer).generate(requests)
        results = rewriter.rewrite(TEXTS, ["p"] * 5, [1] * 5, [2] * 5)
        for one, result in zip(written, results, strict=True):
            assert (result.text, result.tokens_out) == (one.text.strip(), one.tokens_out)
            whole = "truncated" if one.status == "truncated" else "ok" if result.text else "empty"
            assert result.status == whole

    def test_an_answer_does_not_depend_on_its_batch(self, make):
        alone = ask(make(batch_size=1), TEXTS)
        assert ask(make(batch_size=100), TEXTS) == alone
        assert ask(make(batch_size=3), TEXTS[::-1])[::-1] == alone

    def test_the_draw_the_target_the_prompt_and_the_seed_matter(self, make):
        text = ["A fine film."] * 4
        first = ask(make(), text[:1])[0].text
        draws = {one.text for one in ask(make(), text, draws=[0, 1, 2, 3])}
        assert len(draws) == 4
        assert first in draws
        assert ask(make(), text[:1], targets=[0])[0].text != first
        assert make().rewrite(text[:1], ["p"], [1])[0].text != first
        assert ask(make(seed=1), text[:1])[0].text != first

    def test_a_limit_of_its_own_for_each_text(self, make):
        """Twice the text and 64 more."""
        rewriter = make(max_new_tokens=None)
        limits = [rewriter.request(text, w_target=1).max_new_tokens for text in ("a", "b" * 30)]
        assert limits == [2 * 1 + 64, 2 * 30 + 64]

    def test_tokens_are_counted(self, make, tokenizer):
        (result,) = ask(make(), ["a"])
        rendered = "<|im_start|>user\nyes: a<|im_end|>\n<|im_start|>assistant\n"
        assert result.tokens_in == len(tokenizer(rendered).input_ids)

    def test_a_message_that_does_not_fit(self, make, model):
        places = model.config.max_position_embeddings
        long, short = ask(make(), ["x" * places, "a"])
        assert (long.status, long.text) == ("error", None)
        assert f"and the model takes {places}" in long.error
        assert short.status == "truncated"
        (cut,) = ask(make(max_new_tokens=None), ["x" * (places - 50)])
        assert cut.status == "truncated"  # what room is left is used

    def test_system_texts(self, make):
        plain, empty, full = (make(system_prompt=one, temperature=0) for one in (None, "", "Be kind."))
        counts = [ask(one, ["a"])[0].tokens_in for one in (plain, empty, full)]
        assert counts[0] < counts[1] < counts[2]


class TestSources:
    def test_a_name_is_loaded_when_it_is_needed(self, monkeypatch):
        loaded = []
        from lightning_interp.rate.rewriting import chat_rewriters

        real = chat_rewriters.load_causal_lm
        monkeypatch.setattr(chat_rewriters, "load_causal_lm", lambda *a, **k: loaded.append(a) or real(*a, **k))
        rewriter = LocalRewriter("tiny:llama", PLAIN, max_new_tokens=2, device="cpu")
        assert rewriter.name == "local:tiny:llama"
        assert rewriter.estimate_tokens("abcdefgh", "", 1) == (12, 2)
        assert not loaded
        ask(rewriter, ["a"])
        ask(rewriter, ["b"])
        assert loaded == [("tiny:llama",)]

    def test_a_loaded_model_needs_tokenizer_and_name(self, model, tokenizer):
        with pytest.raises(RecipeError, match=r"loaded LlamaForCausalLM with tokenizer=None and name='x'"):
            LocalRewriter(model, PLAIN, name="x")
        with pytest.raises(RecipeError, match=r"and name=None"):
            LocalRewriter(model, PLAIN, tokenizer=tokenizer)

    def test_a_tokenizer_without_a_template(self, model):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(DataError, match="'plainly' has no chat template"):
            ask(LocalRewriter(model, PLAIN, tokenizer=tokenizer, name="plainly"), ["a"])

    def test_all_end_tokens_of_the_model_end_an_answer(self, make, model, monkeypatch):
        """Every byte ends the answer, so nothing is written."""
        monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(261)))
        (result,) = ask(make(), ["a"])
        assert (result.status, result.tokens_out) == ("empty", 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -0.1}, "temperature=-0.1; expected at least 0"),
            ({"top_p": 0}, "top_p=0; expected a share"),
            ({"top_p": 1.1}, "top_p=1.1; expected a share"),
            ({"max_new_tokens": 0}, "max_new_tokens=0; expected at least 1"),
            ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        with pytest.raises(RecipeError, match=message):
            LocalRewriter("tiny:llama", PLAIN, **options)

    def test_identity(self, make):
        ways = [{}, {"name": "other"}, {"seed": 1}, {"temperature": 0.1}, {"top_p": 0.5}, {"max_new_tokens": 7},
                {"system_prompt": ""}, {"dtype": "bfloat16"}]  # fmt: skip
        assert len({rewriter_id(make(**way)) for way in ways}) == len(ways)
        assert rewriter_id(make()) == rewriter_id(make(batch_size=2))
        assert LocalRewriter("tiny:llama", rewrite_template("length")).changes_length


def test_a_run_of_any_batch_size_fills_the_same_store(make, tmp_path):
    texts = []
    for size in (1, 4):
        store = store_of(tmp_path / str(size))
        report = RewriteRun(store, make(batch_size=size), attr=ATTR).run()
        assert set(report.statuses) <= {"ok", "empty", "truncated"}
        assert report.calls >= 6
        texts.append({record.key: record.result for record in store.records()})
    assert texts[0] == texts[1]


class TestEarlierStores:
    def test_a_store_of_an_earlier_version_is_continued_and_nothing_is_written_twice(self, make, tmp_path):
        """Its keys hold the settings of then; the rest is added under them, so that units become complete."""
        earlier = make()
        earlier.params = earlier.earlier_params
        del earlier.earlier_params
        store = store_of(tmp_path)
        first = RewriteRun(store, earlier, attr=ATTR, max_calls=3).run()
        assert (first.calls, first.stopped) == (3, "max_calls")
        before = (tmp_path / "rewrites.jsonl").read_bytes()
        run = RewriteRun(RewriteStore.open(tmp_path), make(), attr=ATTR)
        assert run.by == rewriter_id(earlier) != rewriter_id(make())
        report = run.run()
        assert report.complete
        assert (tmp_path / "rewrites.jsonl").read_bytes().startswith(before)
        keys = [record.key for record in RewriteStore.open(tmp_path).records()]
        assert len(keys) == len(set(keys)) == 3 + report.calls
        assert RewriteStore.open(tmp_path).rewriters(ATTR) == [rewriter_id(earlier)]

    def test_a_fresh_store_gets_the_identity_of_now(self, make, tmp_path):
        run = RewriteRun(store_of(tmp_path), make(), attr=ATTR)
        assert run.by == rewriter_id(make())
        assert "sampler" in make().params
        assert "sampler" not in make().earlier_params


def test_any_writer_of_texts_rewrites_in_the_words_of_a_template(tmp_path):
    shout = FunctionGenerator(lambda request: f" {request.text} ", name="shout", concurrency=3)
    rewriter = TemplateRewriter(shout, PLAIN, name="shout", max_new_tokens=50)
    assert rewriter_id(rewriter) != rewriter_id(TemplateRewriter(shout, PLAIN, name="shout", max_new_tokens=51))
    assert (rewriter.concurrency, rewriter.estimate_tokens("abcdefgh", "", 1)) == (3, (12, 2))
    store = store_of(tmp_path)
    assert RewriteRun(store, rewriter, attr=ATTR).run().complete
    assert store.triples(ATTR).rewrite2[0] == "no: yes: text 0prompt 0prompt 0"


@needs(bundled=True)
def test_the_bundled_model_writes_words():
    rewriter = LocalRewriter("smollm2-135m-instruct", rewrite_template("sentiment"), max_new_tokens=5, device="cpu")
    for result in rewriter.rewrite(["A dull film that never ends.", "Some other text."], ["", ""], [1, 0]):
        assert result.status in ("ok", "truncated")
        assert any(word.isalpha() for word in result.text.split())
