"""Pairs against slow loops over tokens, and what the vocabulary of real and made-up tokenizers gives."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_interp.errors import DataError, IncompatibleModelError, ManifestError, RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs, single_token
from lightning_interp.steering.concepts.vocabulary import pairs_from_vocabulary, word_tokens
from lightning_interp.testing import byte_tokenizer, needs

V = 12
MANY = CounterfactualPairs([(1, 7), (4, 7), (0, 2), (9, 11), (10, 7)], name="many")
"""Three base tokens that share the target 7."""


def distribution(seed, *shape, sharp=2.0, dtype=torch.float64):
    z = sharp * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return z.softmax(-1)


def slow_regroup(pairs, p):
    """P^Z of one distribution, token by token."""
    mass = dict(enumerate(p.tolist()))
    for base, target in pairs.pairs:
        mass[target] += mass.pop(base)
    return [mass[token] for token in sorted(mass)]


@st.composite
def many_pairs(draw):
    """Random pairs of a vocabulary, several base tokens to a target."""
    order = draw(st.permutations(range(V)))
    cut = draw(st.integers(1, V - 1))
    base, targets = order[: draw(st.integers(1, cut))], order[cut:]
    return CounterfactualPairs([(b, draw(st.sampled_from(targets))) for b in base])


class TestDistributions:
    @given(many_pairs(), st.integers(0, 9))
    def test_regrouping_is_the_slow_loop(self, pairs, seed):
        p = distribution(seed)
        found = pairs.regroup(p)
        assert found.tolist() == pytest.approx(slow_regroup(pairs, p), abs=1e-15)
        assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)
        assert len(found) == V - len(set(pairs.base_ids.tolist()))
        torch.testing.assert_close(pairs.log_regroup(p.log()).exp(), found, atol=1e-14, rtol=1e-12)

    @given(many_pairs(), st.integers(0, 9))
    def test_masses_are_sums_over_sets(self, pairs, seed):
        p = distribution(seed)
        base = sum(float(p[t]) for t in {b for b, _ in pairs.pairs})
        target = sum(float(p[t]) for t in {t for _, t in pairs.pairs})
        assert float(pairs.pair_mass(p)) == pytest.approx(base + target, abs=1e-14)
        assert float(pairs.log_pair_mass(p.log()).exp()) == pytest.approx(base + target, abs=1e-12)
        assert float(pairs.target_prob(p)) == pytest.approx(target / (base + target), abs=1e-12)
        assert float(pairs.target_logit(p.log())) == pytest.approx(math.log(target) - math.log(base), abs=1e-10)

    @given(many_pairs(), st.integers(0, 9), st.floats(0, 1))
    def test_the_oracle_moves_the_concept_and_nothing_else(self, pairs, seed, w):
        p = distribution(seed)
        steered = pairs.resplit(p, w)
        assert float(steered.sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(pairs.target_prob(steered)) == pytest.approx(w, abs=1e-10)
        torch.testing.assert_close(pairs.regroup(steered), pairs.regroup(p), atol=1e-14, rtol=0)
        assert float(pairs.pair_mass(steered)) == pytest.approx(float(pairs.pair_mass(p)), abs=1e-12)

    def test_the_oracle_by_hand(self):
        p = distribution(3)
        steered, group = MANY.resplit(p, 0.3), float(p[1] + p[4] + p[10] + p[7])
        assert float(steered[7]) == pytest.approx(0.3 * group)
        assert float(steered[4]) == pytest.approx(0.7 * group * float(p[4] / (p[1] + p[4] + p[10])))
        assert float(steered[2]) == pytest.approx(0.3 * float(p[0] + p[2]))
        assert steered[[3, 5, 6, 8]].tolist() == pytest.approx(p[[3, 5, 6, 8]].tolist())

    def test_leading_dimensions_and_one_share_a_row(self):
        p, w = distribution(1, 2, 3), torch.tensor([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]], dtype=torch.float64)
        assert MANY.regroup(p).shape == (2, 3, V - 5)
        steered = MANY.resplit(p, w)
        torch.testing.assert_close(MANY.target_prob(steered), w)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(steered[i, j], MANY.resplit(p[i, j], float(w[i, j])))
                torch.testing.assert_close(MANY.log_regroup(p[i, j].log()), MANY.log_regroup(p.log())[i, j])

    def test_logs_keep_what_probabilities_lose(self):
        log_p = torch.full((V,), -200.0).index_fill(0, torch.tensor([3]), 0.0)  # float32: exp(-200) is 0
        assert MANY.pair_mass(log_p.exp()) == 0
        assert bool(MANY.target_prob(log_p.exp()).isnan())
        assert MANY.target_prob(log_p.exp(), eps=1e-10) == 0
        assert float(MANY.target_logit(log_p)) == pytest.approx(math.log(3 / 5), abs=1e-5)
        slots = MANY.log_regroup(log_p)
        assert float(slots[MANY.index(log_p).slots[1]]) == pytest.approx(-200 + math.log(4), abs=1e-4)

    def test_a_model_that_excludes_tokens(self):
        p = distribution(2)
        p[[1, 4, 10, 7, 9]] = 0.0  # a group without any mass, and one without base mass
        p = p / p.sum()
        assert not bool(MANY.log_regroup(p.log()).isnan().any())
        torch.testing.assert_close(MANY.log_regroup(p.log()).exp(), MANY.regroup(p))
        steered = MANY.resplit(p, 0.25)
        assert float(steered.sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(steered[9]) == pytest.approx(0.75 * float(p[11]))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_types_are_widened(self, dtype):
        p = distribution(1, 2).to(dtype)
        for found in (MANY.regroup(p), MANY.pair_mass(p), MANY.target_logit(p.log()), MANY.log_regroup(p.log())):
            assert found.dtype == torch.float32

    def test_gradients_flow(self):
        z = torch.randn(2, V, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
        for f in (
            lambda z: MANY.regroup(z.softmax(-1)),
            lambda z: MANY.log_regroup(z.log_softmax(-1)),
            lambda z: MANY.target_logit(z.log_softmax(-1)),
        ):
            assert torch.autograd.gradcheck(f, (z,))

    def test_a_padded_head_is_fitted(self):
        p = torch.cat([distribution(1), torch.zeros(4, dtype=torch.float64)])
        assert MANY.regroup(p).shape == (V + 4 - 5,)
        assert float(MANY.target_prob(p)) == pytest.approx(float(MANY.target_prob(p[:V])))


class TestSplitOfDivergence:
    """KL(P0 || P) = (pair mass of P^Z_0) KL(P^W_0 || P^W) + KL(P^Z_0 || P^Z) for factorizable families (section 4)."""

    @given(st.integers(0, 30), st.floats(0.02, 0.98), st.floats(0.02, 0.98))
    def test_of_factorizable_distributions(self, seed, w0, w1):
        pairs = CounterfactualPairs([(0, 6), (1, 7), (2, 8)])
        first, second = (pairs.resplit(distribution(seed + i, sharp=1.0), w) for i, w in ((0, w0), (100, w1)))
        kl = float((first * (first / second).log()).sum())
        z0, z1 = pairs.regroup(first), pairs.regroup(second)
        off_target = float((z0 * (z0 / z1).log()).sum())
        concept = w0 * math.log(w0 / w1) + (1 - w0) * math.log((1 - w0) / (1 - w1))
        assert kl == pytest.approx(float(pairs.pair_mass(first)) * concept + off_target, abs=1e-11)
        torch.testing.assert_close(z0[pairs.index(first).slots].sum(), pairs.pair_mass(first))

    def test_of_the_closed_form_family(self):
        """g^w_i = zeta_i + (w - 1/2) e0: the family is factorizable everywhere and sigmoid(e0 . lam) is P(W=1)."""
        rng = torch.Generator().manual_seed(5)
        d, n = 5, 4
        zeta = torch.randn(n, d, generator=rng, dtype=torch.float64)
        neutral = torch.randn(6, d, generator=rng, dtype=torch.float64)
        zeta[:, 0], zeta[:, 1], neutral[:, :2] = 0.0, 1.0, 0.0
        half = torch.eye(d, dtype=torch.float64)[0] / 2
        weight = torch.cat([zeta - half, zeta + half, neutral])
        pairs = CounterfactualPairs([(i, n + i) for i in range(n)])
        lam = torch.randn(2, d, generator=rng, dtype=torch.float64)
        p = (lam @ weight.T).softmax(-1)
        torch.testing.assert_close(pairs.target_prob(p), torch.sigmoid(lam[:, 0]))
        w, z, mass = pairs.target_prob(p), pairs.regroup(p), pairs.pair_mass(p)
        kl = (p[0] * (p[0] / p[1]).log()).sum()
        concept = w[0] * (w[0] / w[1]).log() + (1 - w[0]) * ((1 - w[0]) / (1 - w[1])).log()
        torch.testing.assert_close(kl, mass[0] * concept + (z[0] * (z[0] / z[1]).log()).sum(), atol=1e-12, rtol=0)

    def test_it_does_not_hold_in_general(self):
        pairs, p = CounterfactualPairs([(0, 6), (1, 7)]), distribution(1, 2)
        w, z = pairs.target_prob(p), pairs.regroup(p)
        concept = w[0] * (w[0] / w[1]).log() + (1 - w[0]) * ((1 - w[0]) / (1 - w[1])).log()
        split = pairs.pair_mass(p)[0] * concept + (z[0] * (z[0] / z[1]).log()).sum()
        assert abs(float(split - (p[0] * (p[0] / p[1]).log()).sum())) > 1e-3


class TestClassify:
    def slow(self, p, top_k, min_mass):
        order = sorted(range(V), key=lambda token: -float(p[token]))[:top_k]
        sides = [{b for b, _ in MANY.pairs}, {t for _, t in MANY.pairs}]
        for label, side in enumerate(sides):
            if all(token in side for token in order) and sum(float(p[t]) for t in order) > min_mass:
                return label
        return -1

    @given(st.integers(0, 60), st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.7, 0.95]))
    def test_it_is_the_rule_of_the_paper(self, seed, top_k, min_mass):
        p = distribution(seed, 8, sharp=4.0)
        found = MANY.classify(p.log(), top_k=top_k, min_mass=min_mass)
        assert found.tolist() == [self.slow(row, top_k, min_mass) for row in p]

    def test_all_three_answers_come(self):
        p = distribution(0, 4000, sharp=3.0)
        assert set(MANY.classify(p.log(), top_k=2, min_mass=0.5).tolist()) == {-1, 0, 1}

    @pytest.mark.parametrize(("top_k", "min_mass"), [(0, 0.7), (V + 1, 0.7), (3, 1.0), (3, -0.1)])
    def test_rules_that_make_no_sense(self, top_k, min_mass):
        with pytest.raises(RecipeError, match=rf"classify\(top_k={top_k}, min_mass={min_mass}\)"):
            MANY.classify(distribution(0).log(), top_k=top_k, min_mass=min_mass)


class TestMaking:
    def test_ids(self):
        pairs = CounterfactualPairs(
            [(5, 5), (1, 2), (1, 2), (0, 2)], texts=[("e", "e"), ("a", "b"), ("a", "b"), ("c", "b")]
        )
        assert pairs.pairs == ((1, 2), (0, 2))
        assert pairs.texts == (("a", "b"), ("c", "b"))
        assert pairs.dropped == {"identity": 1}
        assert (pairs.base_ids.tolist(), pairs.target_ids.tolist()) == ([0, 1], [2])

    @pytest.mark.parametrize(
        ("given_pairs", "message"),
        [
            ([], "Pairs 'concept' are empty: 0 were given"),
            ([(3, 3)], "are empty: 1 were given and none is left"),
            ([(0, 1), (0, 2)], "Base token 0 of 'concept' has two targets, 1 and 2"),
            ([(0, 1), (1, 2)], r"1 tokens of 'concept' are base and target at once, such as \[1\]"),
            ([(0, 1), (1, 0)], r"2 tokens of 'concept' are base and target at once, such as \[0, 1\]"),
            ([(-1, 2)], r"A pair is \(-1, 2\)"),
        ],
    )
    def test_ids_that_are_no_pairs(self, given_pairs, message):
        with pytest.raises(DataError, match=message):
            CounterfactualPairs(given_pairs)

    def test_texts_of_another_number(self):
        with pytest.raises(DataError, match="Pairs 'concept' have 1 texts for 2 pairs"):
            CounterfactualPairs([(0, 1), (2, 3)], texts=[("a", "b")])

    def test_a_vocabulary_that_is_too_small(self):
        with pytest.raises(
            IncompatibleModelError, match=r"Pairs 'many' hold token 11, but the distribution \[2, 10\] has 10"
        ):
            MANY.regroup(torch.full((2, 10), 0.1))

    @pytest.mark.parametrize("w", [-0.1, 1.1, math.nan])
    def test_shares_that_are_none(self, w):
        with pytest.raises(RecipeError, match=rf"resplit\(w={w:g}\) of 'many'"):
            MANY.resplit(distribution(0), w)

    def test_strings(self):
        tokenizer = byte_tokenizer()
        pairs = CounterfactualPairs.from_strings([("a", "A"), ("b", "B")], tokenizer, name="capital")
        assert pairs.pairs == tuple((tokenizer.encode(c)[0], tokenizer.encode(c.upper())[0]) for c in "ab")
        pairs.check(tokenizer)

    def test_strings_that_are_not_one_token(self):
        texts = {"a": "A", "word": "W", "b": "long"}
        with pytest.raises(
            DataError, match=r"2 of 3 pairs of 'x' are not one token each: 'word' -> 'W', 'b' -> 'long'"
        ):
            CounterfactualPairs.from_strings(texts, byte_tokenizer(), name="x")
        kept = CounterfactualPairs.from_strings(texts, byte_tokenizer(), missing="drop")
        assert (kept.texts, kept.dropped) == ((("a", "A"),), {"missing": 2})
        with pytest.raises(DataError, match=r"are empty: 0 were given"):
            CounterfactualPairs.from_strings({"no": "yes"}, byte_tokenizer(), missing="drop")
        with pytest.raises(RecipeError, match="missing='skip' is unknown"):
            CounterfactualPairs.from_strings(texts, byte_tokenizer(), missing="skip")

    def test_many_missing_strings_are_counted(self):
        with pytest.raises(DataError, match=r"9 of 9 pairs .* and 4 more"):
            CounterfactualPairs.from_strings({f"x{i}": "y" for i in range(9)}, byte_tokenizer())

    def test_a_copy_and_a_pickle_are_the_same(self):
        MANY.regroup(distribution(0))
        for twin in (copy.deepcopy(MANY), pickle.loads(pickle.dumps(MANY))):  # noqa: S301
            assert twin == MANY
            assert twin._indices == {}
            torch.testing.assert_close(twin.regroup(distribution(0)), MANY.regroup(distribution(0)))
        assert hash(MANY) == hash(CounterfactualPairs(MANY.pairs, name="many"))


class TestFiles:
    def test_round_trip(self, tmp_path):
        tokenizer = byte_tokenizer()
        kept = CounterfactualPairs.from_strings({"a": "A", "ab": "AB"}, tokenizer, name="capital", missing="drop")
        again = CounterfactualPairs.load(kept.save(tmp_path / "p" / "pairs.json"), tokenizer=tokenizer)
        assert again == kept
        assert (again.texts, again.dropped) == (kept.texts, {"missing": 1})
        assert CounterfactualPairs.from_dict(MANY.to_dict()) == MANY

    def test_files_that_hold_none(self, tmp_path):
        with pytest.raises(DataError, match=r"gone\.json holds no token pairs"):
            CounterfactualPairs.load(tmp_path / "gone.json")
        for text, message in (
            ("{", "holds no token pairs"),
            ("{}", "KeyError"),
            ("[]", "TypeError"),
            ('{"pairs": [1]}', "'pairs'"),
        ):
            (tmp_path / "bad.json").write_text(text)
            with pytest.raises(DataError, match=message):
                CounterfactualPairs.load(tmp_path / "bad.json")
        (tmp_path / "file").write_text("")
        with pytest.raises(ManifestError, match="Cannot write"):
            MANY.save(tmp_path / "file" / "pairs.json")

    def test_another_tokenizer(self, tmp_path):
        pairs = CounterfactualPairs.from_strings({"a": "A"}, byte_tokenizer())
        data = pairs.to_dict()
        data["pairs"] = [[a + 1, b] for a, b in data["pairs"]]
        (tmp_path / "p.json").write_text(json.dumps(data))
        with pytest.raises(
            IncompatibleModelError, match=rf"token {pairs.pairs[0][0] + 1} is 'a', but in this tokenizer"
        ):
            CounterfactualPairs.load(tmp_path / "p.json", tokenizer=byte_tokenizer())


def word_level(words, unknown="<unk>", sentencepiece=False):
    """A tokenizer whose tokens are these words."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    if sentencepiece:
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown)


class TestSingleTokens:
    def test_a_space_is_part_of_a_token(self):
        tokenizer = word_level(["<unk>", "▁run", "run", "▁running"], sentencepiece=True)
        assert tokenizer.encode("run") == [1]  # the encoder adds a space
        assert single_token(tokenizer, " run") == 1
        assert single_token(tokenizer, "run") == 2
        assert single_token(tokenizer, "▁running") == 3
        assert single_token(tokenizer, " walk") is None
        assert single_token(tokenizer, "<unk>") == 0

    def test_words_of_a_vocabulary(self):
        tokenizer = word_level(["<unk>", "Ġrun", "run", "Ġ42", "Ġé", "a-b", "Ġ"])
        assert list(word_tokens(tokenizer)) == [(1, "run", True), (2, "run", False), (3, "42", True)]


VERBS = """run runs running make makes made making king thing hope hopes hoped hoping hop hops hopped hopping
die dies died dying try tries tried trying aid aids aided aiding aide aides agree agrees agreed agreeing
dye dyes dyed dyeing have has having can cans canned canning visit visits visited visiting
admit admits admitted admitting fix fixes fixed fixing even evening evens sing single wish wishes wished wishing
stop stops stopped need needs needed needing""".split()


class TestVocabulary:
    def test_capitals(self):
        tokenizer = word_level(["<unk>", "Ġword", "ĠWord", "ĠWORD", "word", "Word", "Ġa", "ĠA", "Ġan", "Ġ42"])
        pairs = pairs_from_vocabulary(tokenizer, "capitalised")
        assert pairs.texts == ((" word", " Word"),)
        assert pairs.pairs == ((1, 2),)
        assert pairs.name == "capitalised"

    def test_numbers(self):
        words = ["<unk>", "one", "One", "1", "Ġtwo", "2", "Ġthree", "Ġ3", "Ġtwenty", "Ġ20", "Ġhundred", "Ġ100", "ten"]
        pairs = pairs_from_vocabulary(word_level(words), "number_digit")
        assert pairs.texts == (("one", "1"), ("One", "1"), (" three", " 3"), (" twenty", " 20"), (" hundred", " 100"))

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            (
                "verb_ing",
                "run running,make making,hope hoping,hop hopping,die dying,try trying,agree agreeing,dye dyeing,"
                "have having,visit visiting,admit admitting,fix fixing,wish wishing,need needing",
            ),
            ("verb_past", "hope hoped,hop hopped,die died,try tried,agree agreed,dye dyed,visit visited,admit admitted,"
             "fix fixed,wish wished,need needed"),
            ("verb_third", "run runs,make makes,hope hopes,hop hops,die dies,try tries,aid aids,agree agrees,dye dyes,"
             "have has,visit visits,admit admits,fix fixes,wish wishes,need needs"),
        ],
    )  # fmt: skip
    def test_verbs(self, kind, expected):
        pairs = pairs_from_vocabulary(word_level(["<unk>", *(f"Ġ{word}" for word in VERBS)]), kind)
        found = {(a.strip(), b.strip()) for a, b in pairs.texts}
        wanted = {tuple(pair.split()) for pair in expected.split(",")}
        if kind != "verb_third":  # aid and aide share their -ing and -ed forms
            assert pairs.dropped == {"ambiguous": 2}
        else:
            wanted |= {("aide", "aides")}
        assert found == wanted

    def test_what_has_none(self):
        with pytest.raises(DataError, match=r"\(261 tokens\) has no pair of kind 'verb_ing'"):
            pairs_from_vocabulary(byte_tokenizer(), "verb_ing")
        with pytest.raises(
            RecipeError, match="Unknown kind of pairs 'plural'; expected one of capitalised, number_digit"
        ):
            pairs_from_vocabulary(byte_tokenizer(), "plural")

    @needs(bundled=True)
    def test_the_bundled_vocabulary(self):
        from lightning_interp.models import load_causal_lm

        tokenizer = load_causal_lm("smollm2-135m-instruct").tokenizer
        made = {kind: pairs_from_vocabulary(tokenizer, kind) for kind in ("capitalised", "number_digit", "verb_ing")}
        assert {kind: len(pairs) for kind, pairs in made.items()} == {
            "capitalised": 6116,
            "number_digit": 19,
            "verb_ing": 831,
        }
        for kind, pairs in made.items():
            if kind != "capitalised":  # by far the most, and made alike
                pairs.check(tokenizer)
            assert not set(pairs.base_ids.tolist()) & set(pairs.target_ids.tolist())
        for kind, pair in (
            ("capitalised", (" walk", " Walk")),
            ("number_digit", ("Three", "3")),
            ("verb_ing", (" make", " making")),
        ):
            assert pair in made[kind].texts
        nonsense = {"king", "thing", "string", "bring", "evening", "during", "spring", "ceiling", "wedding", "nothing"}
        assert not nonsense & {b.strip() for _, b in made["verb_ing"].texts}
        assert made["verb_ing"].dropped == {"ambiguous": 28}
