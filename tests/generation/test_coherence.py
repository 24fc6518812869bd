"""Signs of coherence against slow counting; one word over and over is none."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from lightning_interp.errors import DataError
from lightning_interp.generation import (
    BaseReference,
    JudgeResult,
    Response,
    coherence_proxy,
    distinct_n,
    fluency,
    longest_repeated_run,
    non_repetition,
    summary_of,
    surface,
)
from lightning_interp.generation.judging.coherence import share_below, termination
from lightning_interp.generation.judging.responses import measure_parts, read_relevance, read_surprise
from lightning_interp.testing import tiny_model


def test_shares_below_count_ties_half():
    draw = np.random.default_rng(0)
    values, reference = draw.integers(0, 9, 30), draw.integers(0, 9, 11)
    wanted = [sum((r < v) + (r == v) / 2 for r in reference) / 11 for v in values]
    found = share_below(torch.tensor([*values, math.nan]), torch.tensor([*reference, math.nan]))
    assert found.tolist() == pytest.approx([*wanted, math.nan], nan_ok=True)
    with pytest.raises(DataError, match="a reference of 1 values, none of them a number"):
        share_below(found, torch.tensor([math.nan]))


def test_too_likely_is_as_far_from_fluent_as_too_surprising():
    base = torch.arange(1.0, 12.0)
    found = fluency(torch.tensor([0.0, 1.0, 6.0, 11.0, 12.0, math.nan]), base).tolist()
    assert found == pytest.approx([0, 100 / 11, 100, 100 / 11, 0, math.nan], nan_ok=True)
    assert fluency(base, base).mean() == pytest.approx(50, abs=3)


def slow_run(text, n=4):
    """The longest repeated stretch, by trying every one."""
    best = 0
    for start in range(len(text)):
        for end in range(start + n, len(text) + 1):
            grams = [tuple(text[i : i + n]) for i in range(start, end - n + 1)]
            seen = {tuple(text[i : i + n]): i for i in range(len(text) - n, -1, -1)}
            if all(seen[gram] < start + k for k, gram in enumerate(grams)):
                best = max(best, end - start)
    return best / len(text) if text else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_repeated_run(seed):
    draw = np.random.default_rng(seed)
    text = [int(x) for x in draw.integers(0, 2 + seed % 3, 24)]
    assert longest_repeated_run(text) == pytest.approx(slow_run(text))
    assert longest_repeated_run([str(x) for x in text]) == longest_repeated_run(text)
    assert non_repetition(text) == pytest.approx(100 * distinct_n([text]) * (1 - slow_run(text)))


def test_one_word_over_and_over_has_nothing_left():
    assert non_repetition(["luck"] * 500) < 0.01
    assert non_repetition([1, 2, 3] * 100) < 2
    assert non_repetition(list(range(60))) == 100
    assert math.isnan(non_repetition([5]))
    assert longest_repeated_run([]) == longest_repeated_run([1, 1, 1]) == 0


def test_termination_is_relative_to_the_base():
    assert termination(0.02, 0.08) == pytest.approx(25)
    assert termination(0.5, 0.08) == 100
    assert math.isnan(termination(0.5, 0.0))


def test_the_proxy_is_the_mean_of_what_is_known():
    assert coherence_proxy({"fluency": 10.0, "relevance": math.nan, "termination": 50.0}) == 30
    assert math.isnan(coherence_proxy({}))
    with pytest.raises(DataError, match="knows no part 'charm'; expected some of fluency, non_repetition, term"):
        coherence_proxy({"charm": 1.0})


def test_the_surface_of_a_text():
    found = surface("Ab 1 ✨ 🍀🇩🇪!")
    assert found["characters"] == len("Ab 1 ✨ 🍀🇩🇪!")
    assert found["nonalpha"] == pytest.approx(1 - 2 / 8)
    assert found["emoji"] == 4  # a flag is two characters
    text = "luck " * 200
    assert surface(text)["zlib_ratio"] == len(zlib.compress(text.encode())) / len(text) < 0.05
    empty = surface(" ")
    assert math.isnan(empty["nonalpha"])
    assert math.isnan(surface("")["zlib_ratio"])
    assert surface("a\ud800")["characters"] == 2


def response(question, sample, ids, score=0.0, status="ok", **more):
    result = JudgeResult(score, status, {"facets": {"words": 0.5}} if status == "ok" else {})
    text = " ".join(f"w{i}" for i in ids)
    return Response(question=question, sample=sample, prompt=f"q{question}", text=text, token_ids=tuple(ids),
                    prompt_ids=(3, 4), result=result, **more)  # fmt: skip


def test_surprise_is_under_the_model_given():
    model = tiny_model("llama")
    rows = [response(0, 0, [5, 6, 7]), response(0, 1, []), response(1, 0, [9])]
    read_surprise(rows, model)
    with torch.no_grad():
        logp = model(torch.tensor([[3, 4, 5, 6, 7]])).logits[0].double().log_softmax(-1)
    wanted = -sum(float(logp[1 + i, token]) for i, token in enumerate((5, 6, 7))) / 3
    assert rows[0].surprise == pytest.approx(wanted, abs=1e-5)
    assert math.isnan(rows[1].surprise)


def test_relevance_is_the_cosine_with_the_question():
    def vectors(texts):
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    rows = [response(0, 0, [5, 6]), response(1, 0, [])]
    read_relevance(rows, vectors)
    one, other = vectors(["w5 w6", "q0"])
    assert rows[0].relevance == pytest.approx(float(one @ other / one.norm() / other.norm()))
    assert math.isnan(rows[1].relevance)


def test_parts_are_measured_against_the_base():
    rows = [response(0, 0, range(9), 50.0, surprise=2.0, relevance=0.5, end_id=2),
            response(0, 1, [7] * 400, 100.0, surprise=0.1, relevance=0.9),
            response(1, 0, [], None, "empty")]  # fmt: skip
    measure_parts(rows, BaseReference([1.0, 2.0, 3.0], 0.5, [0.1, 0.5]))
    assert rows[0].parts == {
        "fluency": 100.0, "non_repetition": 100.0, "termination": pytest.approx(200 / 3), "relevance": 75.0
    }  # fmt: skip
    assert rows[0].coherence == pytest.approx((100 + 100 + 200 / 3 + 75) / 4)
    assert rows[1].parts == {
        "fluency": 0.0, "non_repetition": pytest.approx(0, abs=0.01), "termination": pytest.approx(200 / 3),
        "relevance": 100.0,
    }  # fmt: skip
    assert math.isnan(rows[2].coherence)
    measure_parts(rows, None)
    assert rows[0].coherence == 100.0
    measure_parts(rows, BaseReference([], 0.0))
    assert rows[0].coherence == 100.0


def test_a_summary_counts_what_has_no_score_and_says_what_it_could_change():
    rows = [response(0, 0, [1, 2, 3], 80.0, surprise=1.0, end_id=2), response(0, 1, [1, 2], None, "refusal"),
            response(1, 0, [1, 2], 40.0, surprise=2.0), response(1, 1, [], None, "empty")]  # fmt: skip
    measure_parts(rows, None)
    found = summary_of(rows)
    assert found["score"]["value"] == 60.0
    assert found["score"]["n"] == 2
    assert found["score_if_missing"] == [30.0, 80.0]
    assert found["scores"] == [[80.0, None], [40.0, None]]
    assert found["statuses"] == [["ok", "refusal"], ["ok", "empty"]]
    assert found["status_counts"] == {"ok": 2, "refusal": 1, "code": 0, "empty": 1, "error": 0}
    assert found["coherence"] == [[100.0, 100.0], [100.0, None]]
    assert found["perplexity"] == pytest.approx((math.e + math.e**2) / 2)
    assert found["distinct_2"] == 0.5
    assert found["ended"] == 0.25
    assert found["tokens"] == 7 / 4
    assert found["facets"] == {"words": 50.0}
    assert found["parts"] == {"fluency": None, "non_repetition": 100.0, "termination": None, "relevance": None}
    nothing = summary_of([response(0, 0, [], None, "refusal")] * 2)
    assert nothing["score"]["value"] is None
    assert nothing["score_if_missing"] == [0.0, 100.0]
    assert rows[1].to_dict()["score"] is None
    assert rows[1].to_dict()["status"] == "refusal"


def test_an_interval_over_questions_is_wider_where_responses_to_one_are_alike():
    alike = summary_of([response(q, s, [1], 100.0 * (q % 2)) for q in range(6) for s in range(8)])["score"]
    spread = summary_of([response(q, s, [1], 100.0 * (s % 2)) for q in range(6) for s in range(8)])["score"]
    assert alike["value"] == spread["value"] == 50
    assert alike["high"] - alike["low"] > 2 * (spread["high"] - spread["low"])
    naive = 2 * 1.96 * 50 / math.sqrt(48)
    assert alike["high"] - alike["low"] > 1.5 * naive
