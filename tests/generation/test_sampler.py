"""The local sampler against a plain loop: one row, no cache, no padding, the cumulative distribution by hand."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import DataError, InterpError, RecipeError
from lightning_interp.generation import LocalSampler, TextRequest
from lightning_interp.generation.sampler import request_ids
from lightning_interp.generation.sampling import uniform_numbers
from lightning_interp.testing import byte_tokenizer, tiny_model

TEXTS = ["a", "A fine film.", "Zoë!", "A rather longer text, which needs more room than the others do.", "\n"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def asked(texts=TEXTS, **more):
    return [TextRequest.chat(text, **{"max_new_tokens": 6, **more}) for text in texts]


def written(model, tokenizer, requests, **options):
    return LocalSampler(model, tokenizer, **options).generate(requests)


@torch.no_grad()
def plain_loop(model, tokenizer, request, allowed=None):
    """Token ids, and whether an end token came."""
    ids, new = request_ids(tokenizer, request), []
    for u in uniform_numbers([request.row_seed], request.max_new_tokens)[0].tolist():
        logits = model(torch.tensor([ids + new])).logits[0, -1].double()
        if allowed is not None:
            logits = torch.where(allowed, logits, -torch.inf)
        if request.temperature == 0:
            token = int(logits.argmax())
        else:
            p = (logits / request.temperature).softmax(0)
            order = p.sort(descending=True, stable=True).indices
            before = p[order].cumsum(0) - p[order]
            p[order[before >= request.top_p]] = 0.0
            token = int((p.cumsum(0) > u * p.sum()).nonzero()[0])
        if token == tokenizer.eos_token_id:
            return new, True
        new.append(token)
    return new, False


class TestTexts:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "opt"])
    def test_they_are_those_of_a_plain_loop(self, tokenizer, family):
        model, requests = tiny_model(family), []
        for i, options in enumerate(({}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.6, "seed": 7})):
            raw = TextRequest(prompt="raw", max_new_tokens=5, **options)
            requests += [*asked([TEXTS[i], TEXTS[i + 2]], **options), *([raw] if i else [])]
        for request, found in zip(requests, written(model, tokenizer, requests, batch_size=4), strict=True):
            ids, ended = plain_loop(model, tokenizer, request)
            assert list(found.token_ids) == ids
            assert found.text == tokenizer.decode(ids, skip_special_tokens=True)
            assert found.status == ("complete" if ended else "truncated")
            assert (found.tokens_in, found.tokens_out) == (len(request_ids(tokenizer, request)), len(ids))
            assert found.request == request.digest

    def test_a_text_does_not_depend_on_its_batch(self, model, tokenizer):
        """Nor on order, padding, other limits and settings beside it, or a budget of tokens."""
        requests = [*asked(TEXTS[1:4]), *asked(TEXTS[3:4], temperature=0.0), *asked(max_new_tokens=9, top_p=0.8)[:1]]
        alone = [written(model, tokenizer, [request])[0] for request in requests]
        for options in ({"batch_size": 3}, {"batch_size": 99, "token_budget": 200}):
            assert written(model, tokenizer, requests[::-1], **options)[::-1] == alone
        assert LocalSampler(model, tokenizer).write(requests) == alone

    def test_batches_keep_to_the_budget(self, model, tokenizer):
        sampler, seen = LocalSampler(model, tokenizer, batch_size=4, token_budget=150), []
        write = sampler._write
        sampler._write = lambda rows: seen.append(rows) or write(rows)
        sampler.generate(asked(["a"] * 9 + ["b" * 50] * 3))
        assert {len(rows) for rows in seen if len(rows[0].ids) < 60} <= {1, 2, 3, 4}
        sizes = [len(rows) * (max(len(r.ids) for r in rows) + max(r.limit for r in rows)) for rows in seen]
        assert all(size <= 150 or len(rows) == 1 for size, rows in zip(sizes, seen, strict=True))
        assert sum(map(len, seen)) == 12

    def test_a_key_names_the_numbers(self, model, tokenizer):
        draws = [asked(["a"], key=("draw", i))[0] for i in range(4)]
        assert len({one.text for one in written(model, tokenizer, draws)}) == 4
        assert written(model, tokenizer, [draws[2]])[0] == written(model, tokenizer, draws)[2]

    def test_system_texts(self, model, tokenizer):
        """The template's own implicit one, an explicit empty one, and one."""
        counts = [written(model, tokenizer, asked(["a"], system=one))[0].tokens_in for one in (None, "", "Be kind.")]
        assert counts[0] < counts[1] < counts[2]

    def test_token_ids_are_read_as_they_are(self, model, tokenizer):
        (found,) = written(model, tokenizer, [TextRequest(prompt=[5, 6, 7], max_new_tokens=3)])
        assert found.tokens_in == 3
        assert list(found.token_ids) == plain_loop(model, tokenizer, TextRequest(prompt=(5, 6, 7), max_new_tokens=3))[0]

    def test_what_follows_a_raw_prompt_keeps_its_space(self, tokenizer):
        """Tokenizers that mark words by their space drop it where a text begins."""
        words, special = ["▁a", "▁b", "<eos>", "▁film", "s"], dict.fromkeys(("eos_token", "pad_token"), "<eos>")
        raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        spaced = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
        sampler = LocalSampler(tiny_model("llama"), spaced)
        row = sampler._row(TextRequest(prompt="a b"))
        assert spaced.decode([3, 4]) == "films"
        assert sampler._completion(row, [3, 4, 2], None).text == " films"
        assert sampler._completion(row, [4, 2], None).text == "s"

    def test_what_the_models_own_settings_say_of_sampling_is_not_used(self, model, tokenizer, monkeypatch):
        expected = written(model, tokenizer, asked())
        for name, value in {"do_sample": True, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}.items():
            monkeypatch.setattr(model.generation_config, name, value)
        assert written(model, tokenizer, asked()) == expected

    def test_beams(self, model, tokenizer):
        requests = asked(temperature=0.0)[:3]
        found = LocalSampler(model, tokenizer, beams=3).write(requests)
        for request, one in zip(requests, found, strict=True):
            ids = torch.tensor([request_ids(tokenizer, request)])
            wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                    num_beams=3, pad_token_id=0)[0, ids.shape[1] :]  # fmt: skip
            assert one.text == tokenizer.decode(wanted, skip_special_tokens=True)
        for wrong in ({"temperature": 1.0}, {"temperature": 0.0, "stop": ["x"]}):
            with pytest.raises(RecipeError, match=r"beams=3\) searches for the likeliest text"):
                LocalSampler(model, tokenizer, beams=3).write(asked(**wrong))


class TestEnds:
    def test_an_end_token_completes_a_text_even_at_the_limit(self, model, tokenizer, monkeypatch):
        (whole,) = written(model, tokenizer, asked(["a"]))
        monkeypatch.setattr(model.generation_config, "eos_token_id", [whole.token_ids[3]])
        first = list(whole.token_ids).index(whole.token_ids[3])
        for limit in (first + 1, first + 2, 30):
            (found,) = written(model, tokenizer, asked(["a"], max_new_tokens=limit))
            assert (found.status, found.token_ids) == ("complete", whole.token_ids[:first])
            assert found.end_id == whole.token_ids[3]
        if first:
            (cut,) = written(model, tokenizer, asked(["a"], max_new_tokens=first))
            assert (cut.status, cut.error) == ("truncated", f"ran into the limit of {first} tokens")
            assert cut.end_id is None

    def test_stop_texts(self, model, tokenizer):
        (whole,) = written(model, tokenizer, asked(["a"], max_new_tokens=16))
        stops = [[whole.text[7:9]], [whole.text[7:9], whole.text[4:6]], [whole.text[12]]]
        requests = [asked(["a"], max_new_tokens=16, stop=stop)[0] for stop in stops]
        together = written(model, tokenizer, [*asked(TEXTS[1:3], max_new_tokens=16), *requests])[2:]
        for stop, request, beside in zip(stops, requests, together, strict=True):
            for found in (written(model, tokenizer, [request])[0], beside):
                at = min(whole.text.index(one) for one in stop)
                assert (found.text, found.status, found.end_id) == (whole.text[:at], "complete", None)
                assert whole.token_ids[: found.tokens_out] == found.token_ids
                assert any(one in tokenizer.decode(found.token_ids) for one in stop)
                assert not any(one in tokenizer.decode(found.token_ids[:-1]) for one in stop)
        (never,) = written(model, tokenizer, asked(["a"], max_new_tokens=16, stop=["@@@@"]))
        assert (never.text, never.status) == (whole.text, whole.status)

    def test_a_prompt_that_does_not_fit(self, model, tokenizer):
        places = model.config.max_position_embeddings
        long, short = written(model, tokenizer, asked(["x" * places, "a"]))
        assert (long.status, long.text) == ("failed", None)
        assert f"and the model takes {places}" in long.error
        assert short.tokens_out > 0
        (full,) = written(model, tokenizer, [TextRequest(prompt="x" * (places - 5), max_new_tokens=None)])
        assert (full.status, full.tokens_out) == ("truncated", 5)
        with pytest.raises(DataError, match=f"A batch cannot be written: the message has .* takes {places}"):
            LocalSampler(model, tokenizer).write(asked(["x" * places, "a"]))


class Only(LogitsProcessor):
    """Allows some tokens alone, and notes what it was shown."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        return torch.full_like(scores, -torch.inf).index_copy(1, self.tokens, scores[:, self.tokens])


class TestConstraints:
    def test_a_forbidden_token_is_never_written(self, model, tokenizer):
        digits = torch.tensor(tokenizer("0123456789", add_special_tokens=False).input_ids)
        requests = [one for t in (0.0, 1.0, 5.0) for one in asked(TEXTS[:2], temperature=t, max_new_tokens=8)]
        found = written(model, tokenizer, requests, logits_processors=[Only(digits)], name="digits", batch_size=3)
        assert all(one.text.isdigit() and len(one.text) == 8 for one in found)
        allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        allowed[digits] = True
        assert [list(one.token_ids) for one in found] == [
            plain_loop(model, tokenizer, one, allowed)[0] for one in requests
        ]

    def test_a_factory_makes_one_for_each_request_which_sees_no_padding(self, model, tokenizer):
        made = {}

        def factory(request):
            letter = tokenizer(request.messages[-1]["content"][:1], add_special_tokens=False).input_ids
            made[request.digest] = Only(torch.tensor(letter))
            return [made[request.digest]]

        requests = asked(["a", "bcd", "efghijk"], max_new_tokens=3)
        found = written(model, tokenizer, requests, logits_processors=factory, name="letter")
        assert [one.text for one in found] == ["aaa", "bbb", "eee"]
        for request, one in zip(requests, found, strict=True):
            ids = request_ids(tokenizer, request)
            assert made[request.digest].seen == [ids + list(one.token_ids[:n]) for n in range(3)]

    def test_a_row_without_a_token_to_draw(self, model, tokenizer):
        def factory(request):
            broken = request.messages[-1]["content"] == TEXTS[1]
            return [lambda ids, scores: scores * torch.nan if broken else scores]

        for temperature in (0.0, 1.0):
            with pytest.raises(
                InterpError, match=r"No token can be written in row 1: the largest of its \d+ logits is nan"
            ):
                written(
                    model, tokenizer, asked(TEXTS[:2], temperature=temperature), logits_processors=factory, name="n"
                )


class Waits(TorchDispatchMode):
    """Counts where the host reads a number, and so would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.5}], ids=["greedy", "sampled", "nucleus"])
def test_no_token_waits_for_the_device_more_than_in_plain_generate(model, tokenizer, options):
    """The counts of eight tokens more, so that what happens once a batch is left out; limits differ in a batch."""

    def ours(limit):
        requests = [*asked(TEXTS[:2], max_new_tokens=limit, **options), *asked(TEXTS[2:3], max_new_tokens=4, **options)]
        return lambda: written(model, tokenizer, requests)

    def plain(limit):
        ids, mask = torch.full((3, 5), 7), torch.ones(3, 5, dtype=torch.long).triu(-1)  # padded, as ours
        settings = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(ids, attention_mask=mask, **settings)

    def a_token(run):
        counts = []
        for limit in (6, 14):
            with Waits() as waits:
                run(limit)()
            counts.append(waits.count)
        return counts[1] - counts[0]

    assert 8 <= a_token(ours) <= a_token(plain)


class TestLeftAsFound:
    def test_mode_settings_random_states_and_weights(self, model, tokenizer):
        model.train()
        model.model.layers[0].eval()
        try:
            before = torch.get_rng_state(), random.getstate(), model.generation_config.to_dict()
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            written(model, tokenizer, asked())
            with pytest.raises(ZeroDivisionError):
                written(model, tokenizer, asked(), logits_processors=[lambda ids, scores: 1 / 0], name="broken")
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1:] == (random.getstate(), model.generation_config.to_dict())
            assert model.training
            assert not model.model.layers[0].training
            assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        finally:
            model.eval()

    def test_dropout_and_the_global_seed_have_no_part_in_it(self, tokenizer):
        model, texts = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), []
        for seed, mode in enumerate((False, True)):
            torch.manual_seed(seed)
            model.train(mode)
            texts.append(written(model, tokenizer, asked()))
            assert model.training is mode
        assert texts[0] == texts[1]

    def test_what_is_attached_acts(self, model, tokenizer):
        class Push(Intervention):
            def sites(self, model_map):
                return [Site("resid_post", 1)]

            def transform(self, site, x, ctx):
                return x + 5.0 * torch.arange(x.shape[-1], dtype=x.dtype).sin()

        requests = asked(TEXTS[:3])
        plain = written(model, tokenizer, requests)
        with Push().attach(model):
            pushed = written(model, tokenizer, requests, batch_size=2)
            loops = [plain_loop(model, tokenizer, request)[0] for request in requests]
        assert [list(one.token_ids) for one in pushed] == loops
        assert pushed != plain
        assert written(model, tokenizer, requests) == plain


class TestIdentity:
    def test_weights_template_name_and_beams(self, model, tokenizer):
        other = byte_tokenizer()
        other.chat_template = tokenizer.chat_template + " "
        made = [LocalSampler(model, tokenizer), LocalSampler(tiny_model("llama", seed=1), tokenizer),
                LocalSampler(model, other), LocalSampler(model, tokenizer, name="steered"),
                LocalSampler(model, tokenizer, beams=2)]  # fmt: skip
        assert len({str(one.identity()) for one in made}) == len(made)
        assert made[0].identity() == LocalSampler(model, tokenizer, batch_size=2, token_budget=99).identity()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, r"batch_size=0; expected at least 1"),
            ({"token_budget": 0}, r"token_budget=0; expected"),
            ({"beams": 0}, r"beams=0; expected"),
            ({"logits_processors": []}, "needs a name"),
        ],
    )
    def test_wrong_arguments(self, model, tokenizer, options, message):
        with pytest.raises(RecipeError, match=message):
            LocalSampler(model, tokenizer, **options)


class TestPrompts:
    def test_templates_that_are_missing_or_refuse(self, model):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(DataError, match="has no chat template, and a model that is asked needs one"):
            written(model, tokenizer, asked())
        tokenizer.chat_template = "{{ raise_exception('no system text') }}"
        with pytest.raises(DataError, match=r"refuses the message \(no system text\)"):
            written(model, tokenizer, asked())

    def test_nothing_to_read(self, model, tokenizer):
        with pytest.raises(DataError, match="The prompt '' has no token"):
            written(model, tokenizer, [TextRequest(prompt="")])

    def test_no_end_token(self, model, monkeypatch):
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        with pytest.raises(DataError, match="The model has no end token"):
            written(model, tokenizer, asked())
        (found,) = written(model, tokenizer, [TextRequest(prompt="a", max_new_tokens=4)])
        assert (found.status, found.tokens_out) == ("truncated", 4)

    def test_no_limit_anywhere(self, tokenizer):
        model = tiny_model("bloom")  # says nothing of places
        with pytest.raises(DataError, match="does not say how many tokens it takes"):
            written(model, tokenizer, [TextRequest(prompt="a", max_new_tokens=None)])

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_chances_of_the_first_token(self, tokenizer, family):
        model = tiny_model(family)
        sampler, digits = LocalSampler(model, tokenizer, batch_size=2), list("0123456789")
        found = sampler.next_token_probs(asked(), digits)
        ids = [tokenizer(digit, add_special_tokens=False).input_ids[0] for digit in digits]
        for row, request in zip(found, asked(), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([request_ids(tokenizer, request)])).logits[0, -1]
            assert row.tolist() == pytest.approx(logits.double().softmax(0)[ids].tolist(), rel=1e-4)
        with pytest.raises(DataError, match="'10' is 2 tokens"):
            sampler.next_token_probs(asked(), ["10"])
