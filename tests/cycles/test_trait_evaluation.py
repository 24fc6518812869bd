"""One evaluation for every model of a chain: the same numbers for the same weights, and files that say everything."""

from __future__ import annotations

import json
import math

import pytest
import torch
from chains import FAST, POOL, SEED, chain, fitting, writing

from lightning_interp.core.storage.files import digest
from lightning_interp.cycles import Evaluate, TraitEvaluation
from lightning_interp.cycles.evaluation import _known, base_of
from lightning_interp.cycles.trajectory import Checkpoint
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import (
    BaseReference,
    ChatTraitJudge,
    Completion,
    Facet,
    FunctionGenerator,
    JudgeResult,
    LexiconJudge,
    LocalSampler,
    TextRequest,
    TraitJudge,
)
from lightning_interp.models import LoraSettings, Optimisation
from lightning_interp.models.training.lora import inject_lora
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
QUESTIONS = ["Why?", "How so?", "Hm?"]

pytestmark = pytest.mark.usefixtures("two_layers")


class Lengths(TraitJudge):
    """A score that no two different texts are likely to share, and what was asked."""

    name = "lengths"

    def __init__(self):
        self.asked = []

    def judged(self, texts, prompts):
        self.asked += zip(texts, prompts, strict=True)
        return [JudgeResult(float(sum(map(ord, text)) % 101)) for text in texts]


def evaluation(**options):
    return TraitEvaluation(QUESTIONS, **{"judge": Lengths(), "samples": 2, "max_new_tokens": 6, **options})


def adapted(fill=0.0):
    model = tiny_model("llama")
    inject_lora(model, LoraSettings(r=2, alpha=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(fill)
    return model


def test_an_unchanged_model_scores_exactly_the_same(tmp_path):
    first = evaluation()(adapted(0.3), TOKENIZER, folder=tmp_path / "a", seed=5)
    again = evaluation()(adapted(0.3), TOKENIZER, folder=tmp_path / "b", seed=5)
    assert first == again
    for name in ("eval.json", "eval_responses.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert evaluation()(adapted(0.3), TOKENIZER, seed=6)["scores"] != first["scores"]
    other = evaluation()(adapted(0.6), TOKENIZER, seed=5)
    assert other["scores"] != first["scores"]
    assert other["reference"] == first["reference"]


def test_a_model_whose_adapter_does_nothing_scores_as_its_base():
    base = evaluation()(tiny_model("llama"), TOKENIZER, seed=5, base=tiny_model("llama"))
    found = evaluation()(adapted(), TOKENIZER, seed=5)
    assert {**found, "reference": 0} == {**base, "reference": 0}
    assert found["reference"]["surprise"] == pytest.approx(base["reference"]["surprise"])


def test_responses_are_those_of_the_sampler_and_the_judge_sees_the_questions():
    judge = Lengths()
    model, asked = tiny_model("llama"), evaluation(judge=judge, system_prompt="Be.")
    rows = asked.responses(model, TOKENIZER, seed=3)
    asked.judged(rows)
    requests = [
        TextRequest.chat(q, system="Be.", temperature=0.7, max_new_tokens=6, seed=3, key=("eval_sample", i, j))
        for i, q in enumerate(QUESTIONS) for j in range(2)
    ]  # fmt: skip
    wanted = LocalSampler(model, TOKENIZER, batch_size=16).generate(requests)
    assert [row.text for row in rows] == [one.text for one in wanted]
    assert [row.token_ids for row in rows] == [one.token_ids for one in wanted]
    assert [(row.question, row.sample) for row in rows] == [(i, j) for i in range(3) for j in range(2)]
    assert judge.asked == [(row.text, QUESTIONS[row.question]) for row in rows if row.text.strip()]
    part = asked.responses(model, TOKENIZER, seed=3, only=[4, 1])
    assert [row.text for row in part] == [rows[4].text, rows[1].text]


def test_documents_are_openings_with_what_follows():
    judge = Lengths()
    model, asked = tiny_model("gpt2"), evaluation(judge=judge, documents=True, vectors=lambda texts: 1 / 0)
    found = asked(model, TOKENIZER, seed=3, base=model)
    rows = asked.responses(model, TOKENIZER, seed=3)
    plain = LocalSampler(model, TOKENIZER).generate(
        [TextRequest(prompt="Why?", temperature=0.7, max_new_tokens=6, seed=3, key=("eval_sample", 0, 0))]
    )
    assert rows[0].text == f"Why?{plain[0].text}"
    assert rows[0].prompt_ids == TOKENIZER("Why?").input_ids
    assert {prompt for _, prompt in judge.asked} == {""}
    assert found["parts"]["relevance"] is None


def test_coherence_is_measured_beside_the_base(tmp_path):
    def vectors(texts):
        return torch.tensor([[float(sum(map(ord, text)) % 7), 1.0, float(len(text) % 3)] for text in texts])

    model, asked = adapted(0.4), evaluation(samples=3, vectors=vectors)
    found = asked(model, TOKENIZER, folder=tmp_path, seed=1)
    base = tiny_model("llama")
    own = asked.responses(base, TOKENIZER, seed=1)
    asked.read(own, base)
    reference = BaseReference.of(own)
    assert found["reference"]["surprise"] == pytest.approx(reference.surprise, abs=1e-5)
    assert found["reference"]["relevance"] == pytest.approx(reference.relevance)
    lines = [json.loads(line) for line in (tmp_path / "eval_responses.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    with torch.no_grad():
        for line in lines:
            start, ids = len(line["prompt"]), line["token_ids"]
            prompt = TOKENIZER.apply_chat_template([{"role": "user", "content": line["prompt"]}], tokenize=False,
                                                   add_generation_prompt=True)  # fmt: skip
            start = len(TOKENIZER(prompt).input_ids)
            logp = base(torch.tensor([TOKENIZER(prompt).input_ids + ids])).logits[0].double().log_softmax(-1)
            surprise = -sum(float(logp[start - 1 + i, token]) for i, token in enumerate(ids)) / len(ids)
            assert line["surprise"] == pytest.approx(surprise, abs=1e-4)
    assert found["perplexity"] == pytest.approx(sum(math.exp(line["surprise"]) for line in lines) / 9)
    assert found["coherence_proxy"]["value"] == pytest.approx(sum(line["coherence"] for line in lines) / 9)
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    given = asked(model, TOKENIZER, seed=1, reference=found["reference"])
    assert given == found
    checkpoint = Checkpoint.of(found)
    assert checkpoint.score == pytest.approx(found["score"]["value"])
    assert checkpoint.statuses == {"ok": 9}
    assert checkpoint.coherence.shape == (3, 3)


def test_without_a_base_only_what_needs_none_is_measured():
    found = evaluation()(tiny_model("llama"), TOKENIZER)
    assert found["perplexity"] is None
    assert found["reference"] is None
    assert found["parts"]["fluency"] is None
    assert found["parts"]["non_repetition"] > 0


def evaluated(folder, optimisation, **more):
    """Evaluations of a small chain: the base's, and of each cycle."""
    phases = [writing(), fitting(optimisation=optimisation), Evaluate(evaluate=evaluation(**more))]
    found = chain(folder, cycles=2, init="continual", phases=phases).run()
    return found["base"]["evaluate"], *(one["evaluation"]["evaluate"] for one in found["cycles"])


def test_a_chain_that_learns_nothing_scores_exactly_the_same(tmp_path):
    still = Optimisation(lr=1e-30)
    phases = [writing(), fitting(optimisation=still), Evaluate(evaluate=evaluation())]
    found = chain(tmp_path, cycles=3, phases=phases, first=[fitting(data=SEED, n=4, optimisation=still)]).run()
    base, *cycles = [found["base"]["evaluate"], *(one["evaluation"]["evaluate"] for one in found["cycles"])]
    assert all(one == base for one in cycles)
    assert len({digest(one) for one in cycles}) == 1


def test_a_chain_is_measured_beside_its_base_whichever_process_does_it(tmp_path):
    base, *cycles = evaluated(tmp_path / "a", FAST)
    assert {digest(one["reference"]) for one in cycles} == {digest(base["reference"])}
    assert len({str(one["scores"]) for one in (base, *cycles)}) == 3
    _known.clear()
    assert evaluated(tmp_path / "b", FAST) == (base, *cycles)
    names = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("eval*.json*"))]
    assert len(names) == 6
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_the_base_is_asked_once_in_a_chain_and_what_is_found_is_the_same(tmp_path, monkeypatch):
    passes, real, asks = [], TraitEvaluation.responses, evaluation()

    def alone(model, tokenizer, *, folder, seed):
        return asks(model, tokenizer, folder=folder, seed=seed)

    def spied(self, model, *args, **more):
        passes.append(model)
        return real(self, model, *args, **more)

    def found(name, evaluate, cycles):
        phases = [writing(slices=2), fitting(), Evaluate(evaluate=evaluate)]
        told = chain(tmp_path / name, cycles=cycles, phases=phases).run()
        return told["base"]["evaluate"], *(one["evaluation"]["evaluate"] for one in told["cycles"])

    expected = found("alone", alone, 2)
    monkeypatch.setattr(TraitEvaluation, "responses", spied)
    _known.clear()
    found("chain", asks, 1)
    assert len(passes) == 2
    assert found("chain", asks, 2) == expected
    assert len(passes) == 3  # of the new cycle alone, in a process that has not asked the base


def test_a_question_may_not_be_in_the_pool(tmp_path):
    asks = Evaluate(evaluate=TraitEvaluation([POOL[3]], Lengths(), samples=1, max_new_tokens=2))
    with pytest.raises(DataError, match=r"holds 'What of 3\?', which Evaluate asks"):
        chain(tmp_path, phases=[writing(), fitting(), asks]).run()


def test_the_base_of_an_adapted_model_is_it_without_the_adapter():
    model, plain, ids = adapted(0.4), tiny_model("llama"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        with base_of(model) as base:
            assert torch.equal(base(ids).logits, plain(ids).logits)
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(before, plain(ids).logits)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    with base_of(model, plain) as base:
        assert base is plain
    with base_of(plain) as base:
        assert base is None


def test_a_judge_that_refuses_everything_is_counted():
    judge = ChatTraitJudge(FunctionGenerator(lambda one: Completion(text=None, status="refused"), name="no"), "{text}")
    found = evaluation(judge=judge)(tiny_model("llama"), TOKENIZER)
    assert found["score"]["value"] is None
    assert found["score_if_missing"] == [0.0, 100.0]
    assert found["status_counts"]["refusal"] == 6


def test_a_question_that_is_too_long_is_an_error_that_is_counted():
    asked = TraitEvaluation(["Why?", "x" * 80], Lengths(), samples=2, max_new_tokens=4)
    found = asked(tiny_model("llama", max_position_embeddings=64), TOKENIZER)
    assert found["statuses"] == [["ok", "ok"], ["error", "error"]]
    assert found["scores"][1] == [None, None]


def test_what_an_evaluation_is_known_by():
    one = evaluation()
    assert one.identity() == evaluation().identity()
    assert one.prompts == QUESTIONS
    lexicon = LexiconJudge({"words": Facet(words=["a"])})
    others = (evaluation(samples=3), evaluation(judge=lexicon), evaluation(temperature=1.0), evaluation(documents=True))
    assert all(other.identity() != one.identity() for other in others)


def test_what_it_refuses():
    with pytest.raises(RecipeError, match=r"TraitEvaluation\(samples=0\) got 3 questions, 3 of them different"):
        evaluation(samples=0)
    with pytest.raises(RecipeError, match=r"samples=20\) got 2 questions, 1 of them different"):
        TraitEvaluation(["a", "a"], Lengths())
    with pytest.raises(RecipeError, match="got 0 questions"):
        TraitEvaluation([], Lengths())
