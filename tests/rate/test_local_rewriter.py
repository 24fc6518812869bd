from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from rewriting import ATTR, store_of

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.local_model import LocalRewriter
from lightning_interp.rate.rewriting.records import text_sha
from lightning_interp.rate.rewriting.rewriters import rewriter_id
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


def step_by_step(model, tokenizer, text, *, target=1, prompt="", draw=0, seed=0, temperature=0.7, top_p=1.0, limit=6):
    """An independent sampler: one text, no batch, no cache; the whole prefix is run again for each token."""
    message = [{"role": "user", "content": PLAIN.render(text, w_target=target, prompt=prompt)}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    key = (text_sha(text), text_sha(prompt), target, draw)
    generator = torch.Generator().manual_seed(derived_seed(seed, "rewrite", *key))
    written = []
    for _ in range(limit):
        with torch.no_grad():
            logits = model(torch.tensor([ids + written])).logits[0, -1].double()
        if temperature > 0:
            chances = (logits / temperature).softmax(0)
            order = chances.sort(descending=True, stable=True).indices
            kept, mass = [], 0.0
            for index in order.tolist():
                if mass >= top_p:
                    break
                kept.append(index)
                mass += float(chances[index])
            uniform = torch.rand(len(chances), generator=generator, dtype=torch.float64)
            gumbel = -(-(uniform.log())).log()
            token = max(kept, key=lambda index: float(chances[index].log() + gumbel[index]))
        else:
            token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), True
        written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), False


class TestAnswers:
    @pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.6, "seed": 7}])
    def test_they_are_those_of_a_plain_loop(self, make, model, tokenizer, options):
        results = ask(make(batch_size=3, **options), TEXTS)
        for text, result in zip(TEXTS, results, strict=True):
            written, count, ended = step_by_step(model, tokenizer, text, **options)
            assert (result.text, result.tokens_out) == (written, count)
            assert result.status == ("truncated" if not ended else "ok" if written else "empty")

    @pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "opt"])
    def test_other_families(self, make, tokenizer, family):
        other = tiny_model(family)
        results = ask(make(model=other, batch_size=4), TEXTS)
        for text, result in zip(TEXTS, results, strict=True):
            assert result.text == step_by_step(other, tokenizer, text)[0]

    def test_an_answer_does_not_depend_on_its_batch(self, make):
        alone = [ask(make(batch_size=1), [text])[0] for text in TEXTS]
        assert ask(make(batch_size=2), TEXTS) == alone
        assert ask(make(batch_size=100), TEXTS) == alone
        assert ask(make(batch_size=4), TEXTS[::-1])[::-1] == alone
        assert ask(make(batch_size=3), TEXTS * 2) == alone * 2

    def test_the_draw_the_target_the_prompt_and_the_seed_matter(self, make):
        text = ["A fine film."] * 4
        first = ask(make(), text[:1])[0].text
        draws = {one.text for one in ask(make(), text, draws=[0, 1, 2, 3])}
        assert len(draws) == 4
        assert first in draws
        assert ask(make(), text[:1], targets=[0])[0].text != first
        assert make().rewrite(text[:1], ["p"], [1])[0].text != first
        assert ask(make(seed=1), text[:1])[0].text != first

    def test_it_is_sampled_from_the_model(self, make, model, tokenizer):
        """First tokens over many draws have the model's own probabilities (chi-square over the likely ones)."""
        n = 3000
        rewriter = make(max_new_tokens=1, temperature=0.5, batch_size=500)
        seen = Counter()
        generate = rewriter._generate

        def watched(*args):
            rows = generate(*args)
            seen.update(ids[0] for ids in rows)
            return rows

        rewriter._generate = watched
        ask(rewriter, ["a"] * n, draws=list(range(n)))
        message = [{"role": "user", "content": "yes: a"}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            logits = model(tokenizer(rendered, return_tensors="pt").input_ids).logits[0, -1].double()
        chances = (logits / 0.5).softmax(0)
        likely = [i for i in range(len(chances)) if float(chances[i]) * n >= 10]
        assert len(likely) >= 5
        expected = [float(chances[i]) * n for i in likely]
        statistic = sum((seen[i] - e) ** 2 / e for i, e in zip(likely, expected, strict=True))
        assert statistic < len(likely) + 5 * (2 * len(likely)) ** 0.5

    def test_the_nucleus(self, make):
        """With next to no mass allowed, only the most likely token is left: the greedy answer."""
        assert [one.text for one in ask(make(top_p=1e-6), TEXTS)] == [
            one.text for one in ask(make(temperature=0), TEXTS)
        ]

    def test_a_limit_of_its_own_for_each_text(self, make):
        """Twice the text and 64 more; that of the longest in the batch does not lift the others'."""
        rewriter = make(max_new_tokens=None, batch_size=8)
        results = ask(rewriter, ["a", "b" * 30])
        alone = [ask(rewriter, [text])[0] for text in ("a", "b" * 30)]
        assert results == alone
        assert results[0].tokens_out <= 2 * 1 + 64
        assert results[1].tokens_out <= 2 * 30 + 64

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

    def test_what_the_models_own_settings_say_of_sampling_is_not_used(self, make, model, tokenizer, monkeypatch):
        expected = ask(make(), TEXTS)
        for name, value in (
            ("do_sample", True),
            ("repetition_penalty", 5.0),
            ("no_repeat_ngram_size", 1),
            ("top_k", 1),
        ):
            monkeypatch.setattr(model.generation_config, name, value)
        assert ask(make(), TEXTS) == expected


class TestLeftAsFound:
    def test_mode_and_random_states(self, make, model):
        model.train()
        model.model.layers[0].eval()
        try:
            before = torch.get_rng_state(), random.getstate()
            ask(make(), ["a"])
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1] == random.getstate()
            assert model.training
            assert not model.model.layers[0].training
        finally:
            model.eval()

    def test_a_model_in_training_answers_without_dropout(self, make):
        answers = []
        other = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        for mode in (False, True):
            other.train(mode)
            answers.append(ask(make(model=other), TEXTS))
            assert other.training is mode
        assert answers[0] == answers[1]

    def test_the_global_seed_has_no_part_in_it(self, make):
        answers = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            answers.append(ask(make(), TEXTS))
        assert answers[0] == answers[1]

    def test_weights_and_names(self, make, model):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ask(make(), ["a"])
        after = model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)


class TestSources:
    def test_a_name_is_loaded_when_it_is_needed(self, monkeypatch):
        loaded = []
        from lightning_interp.rate.rewriting import local_model

        real = local_model.load_causal_lm
        monkeypatch.setattr(local_model, "load_causal_lm", lambda *a, **k: loaded.append(a) or real(*a, **k))
        rewriter = LocalRewriter("tiny:llama", PLAIN, max_new_tokens=2, device="cpu")
        assert rewriter.name == "local:tiny:llama"
        assert rewriter.estimate_tokens("abcdefgh", "", 1) == (4, 2)
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

    def test_a_template_that_refuses(self, model):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no system text') }}"
        with pytest.raises(DataError, match=r"chat template of 'strict' refuses the message \(no system text\)"):
            ask(LocalRewriter(model, PLAIN, tokenizer=tokenizer, name="strict"), ["a"])

    def test_no_end_token(self, model, monkeypatch):
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        with pytest.raises(DataError, match="The model has no end token"):
            ask(LocalRewriter(model, PLAIN, tokenizer=tokenizer, name="endless"), ["a"])

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


@needs(bundled=True)
def test_the_bundled_model_writes_words():
    rewriter = LocalRewriter("smollm2-135m-instruct", rewrite_template("sentiment"), max_new_tokens=24, device="cpu")
    (result,) = rewriter.rewrite(["A dull film that never ends."], [""], [1])
    assert result.status in ("ok", "truncated")
    assert any(word.isalpha() for word in result.text.split())
    assert result == rewriter.rewrite(["Some other text.", "A dull film that never ends."], ["", ""], [0, 1])[1]
