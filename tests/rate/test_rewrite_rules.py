from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.labellers import Contains, StartsWithVowel
from lightning_interp.rate.rewriting.rewriters import rewriter_id
from lightning_interp.rate.rewriting.rules import (
    Drop,
    MarkToggle,
    OpenerToggle,
    RepairTranspositions,
    RuleRewriter,
    swap_letters,
)
from lightning_interp.rate.texts.words import word_counts

WORDS = {"velvet": 900, "film": 90, "garden": 50, "angel": 70, "angle": 400, "tower": 300}
LETTERS = st.text(alphabet="abcdefg XYZ.,!'\n", max_size=60)


class TestOpener:
    VOWEL = OpenerToggle("Well,", "Also,")

    @given(LETTERS, st.integers(0, 1))
    def test_it_sets_the_value_whatever_was_there(self, text, target):
        assert StartsWithVowel().label(self.VOWEL(text, target)) == target

    @given(LETTERS)
    def test_both_rewrites_differ_in_the_opening_alone(self, text):
        zero, one = self.VOWEL(text, 0), self.VOWEL(text, 1)
        assert zero.removeprefix("Well,") == one.removeprefix("Also,")
        assert self.VOWEL(zero, 1) == one
        assert self.VOWEL(one, 0) == zero

    def test_nothing_on_one_side(self):
        thanks = OpenerToggle("", "Thanks!", strip=r"(thanks|thank you)\b\W*")
        assert thanks("Thank you, it works.", 0) == "it works."
        assert thanks("THANKS it works.", 1) == "Thanks! it works."
        assert thanks("Thanksgiving is near.", 0) == "Thanksgiving is near."
        assert thanks("It works.", 0) == "It works."
        assert thanks("Thanks!", 0) == ""

    def test_wrong_phrases(self):
        with pytest.raises(RecipeError, match=r"OpenerToggle\('A', 'A'\): the phrases must differ"):
            OpenerToggle("A", "A")
        with pytest.raises(RecipeError, match=r"'\(' is no regular expression"):
            OpenerToggle("A", "B", strip="(")


class TestMark:
    @given(LETTERS, st.integers(0, 1), st.sampled_from(["!", "!!!"]))
    def test_it_sets_the_value_whatever_was_there(self, text, target, mark):
        assert Contains("!").label(MarkToggle(mark)(text, target)) == target

    @given(LETTERS)
    def test_words_stay_apart(self, text):
        """A model that splits at punctuation and ignores it sees the same words."""
        for target in (0, 1):
            assert re.findall(r"\w+", MarkToggle("!")(text, target)) == re.findall(r"\w+", text)

    def test_examples(self):
        toggle = MarkToggle("!!!")
        assert toggle("Good film. ", 1) == "Good film!!!"
        assert toggle("Good film", 1) == "Good film!!!"
        assert toggle("Good! film", 1) == "Good! film"
        assert toggle("Oh!! no! why?!", 0) == "Oh. no. why?."
        assert MarkToggle("!", instead="")("Oh! no!", 0) == "Oh no"
        assert MarkToggle("!", instead="")("Oh.", 1) == "Oh.!"

    @pytest.mark.parametrize("fields", [("",), ("!?",), ("!", "!"), ("?", "??")])
    def test_wrong_marks(self, fields):
        with pytest.raises(RecipeError, match=r"MarkToggle\(.*expected a mark of one character"):
            MarkToggle(*fields)


class TestDrop:
    @pytest.mark.parametrize(
        ("rule", "text", "left"),
        [
            (Drop.mentions(), "@ann: see @bob_2, a@b.de", "see , a@b.de"),
            (Drop.links(), "see https://x.y/z?q=1 and www.a.b now", "see and now"),
            (Drop.markup(), "one<br /><br/>two <b>three</b>, 1 < 2 > 0", "one two three , 1 < 2 > 0"),
            (Drop.phrase("really"), "Really, I really do; unreally.", ", I do; unreally."),
            (Drop(r"\d+", "#"), "room 12 of 345", "room # of #"),
            (Drop.mentions(), " nothing  here ", " nothing  here "),
        ],
    )
    def test_examples(self, rule, text, left):
        assert rule(text) == left

    def test_a_wrong_expression(self):
        with pytest.raises(RecipeError, match=r"'\[' is no regular expression: unterminated"):
            Drop("[")


class TestRepair:
    @pytest.mark.parametrize(
        ("text", "repaired"),
        [
            ("velvte film", "velvet film"),
            ("Velvte flim", "Velvet film"),
            ("Velvet Flim", "Velvet Film"),
            ("eVlvet FLIM", "Velvet FILM"),
            ("an angel", "an angel"),
            ("agnel here", "angel here"),
            ("otwer, gadren!", "tower, garden!"),
            ("xyzzy fi", "xyzzy fi"),
            ("don't otwer", "don't tower"),
        ],
    )
    def test_examples(self, text, repaired):
        assert RepairTranspositions(WORDS)(text) == repaired

    def test_the_most_frequent_word_is_taken(self):
        """``lamp`` is one swap away from both."""
        assert RepairTranspositions({"lmap": 2, "lapm": 1})("lamp") == "lmap"
        assert RepairTranspositions({"lmap": 1, "lapm": 2})("lamp") == "lapm"
        assert RepairTranspositions({"lmap": 1, "lapm": 1})("lamp") == "lapm"

    @given(st.lists(st.sampled_from(sorted(WORDS)), min_size=1, max_size=8), st.integers(0, 1000))
    def test_a_swap_of_a_known_word_is_repaired_or_is_a_word(self, words, seed):
        text = " ".join(words)
        back = RepairTranspositions(WORDS)(swap_letters(text, 100, seed=seed, key="x"))
        assert all(word in WORDS for word in back.split())


class TestTypos:
    TEXT = "The quick brown fox, it jumps over 12 lazy dogs; so do I!"

    @pytest.mark.parametrize("percent", [0, 5, 10, 25, 30, 99, 100])
    def test_so_many_words_change_at_most(self, percent):
        words = self.TEXT.split()
        for seed in range(20):
            changed = swap_letters(self.TEXT, percent, seed=seed, key="a").split()
            different = [(a, b) for a, b in zip(words, changed, strict=True) if a != b]
            assert len(different) <= math.floor(len(words) * percent / 100)
            for a, b in different:
                assert sorted(a) == sorted(b)
                places = [i for i in range(len(a)) if a[i] != b[i]]
                assert len(places) == 2
                assert places[1] - places[0] == 1
                assert a[places[0]].isalpha()
                assert a[places[1]].isalpha()
                assert len(a) > 2

    def test_spaces_stay(self):
        text = "  one\n\ntwo\tthree  "
        assert re.sub(r"\S", "", swap_letters(text, 100, seed=0, key=1)) == re.sub(r"\S", "", text)

    def test_a_higher_share_misspells_the_same_words_and_more(self):
        levels = [swap_letters(self.TEXT, percent, seed=3, key="a").split() for percent in range(0, 101, 10)]
        for lower, higher in pairwise(levels):
            for plain, a, b in zip(self.TEXT.split(), lower, higher, strict=True):
                assert a in (plain, b)

    def test_seed_and_key_decide(self):
        texts = {swap_letters(self.TEXT, 50, seed=seed, key=key) for seed in range(3) for key in range(3)}
        assert len(texts) == 9
        assert swap_letters(self.TEXT, 50, seed=1, key=1) in texts

    @pytest.mark.parametrize("percent", [-1, 101, float("nan")])
    def test_a_wrong_share(self, percent):
        with pytest.raises(RecipeError, match=f"percent={percent}; expected a share"):
            swap_letters("a", percent, seed=0, key=0)

    def test_no_words(self):
        assert swap_letters(" ", 50, seed=0, key=0) == " "


class TestRewriter:
    def test_what_is_always_done_comes_first(self):
        rewriter = RuleRewriter(MarkToggle("!"), always=[Drop.links(), RepairTranspositions(WORDS)])
        assert rewriter.apply("velvte film http://a.b/c", 1) == "velvet film!"
        assert rewriter.apply("velvte film! http://a.b/c", 0) == "velvet film."

    def test_the_whole_table_of_words_is_named_by_its_digest(self):
        large = {f"word{i}": i for i in range(101)}
        one, two = (
            RuleRewriter(MarkToggle(), always=[RepairTranspositions(table)]) for table in (large, {**large, "word1": 9})
        )
        assert one.params["always"][0]["counts"].startswith("sha256:")
        assert rewriter_id(one) != rewriter_id(two)
        small = RuleRewriter(MarkToggle(), always=[RepairTranspositions(WORDS)])
        assert small.params["always"] == [{"rule": "RepairTranspositions", "counts": WORDS}]

    def test_any_function_is_a_rule(self):
        def shout(text, target):
            return text.upper() if target else text.lower()

        rewriter = RuleRewriter(shout, always=[str.strip], name="shout")
        assert [one.text for one in rewriter.rewrite([" a ", "B "], ["", ""], [1, 0])] == ["A", "b"]
        assert [rule["rule"] for rule in rewriter.params["always"]] == ["str.strip"]
        assert rewriter.params["toggle"]["rule"].endswith("shout")


class TestWords:
    def test_a_file(self, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text(";;; remark\n\nThe 3\nthe 4\nice cream 2\n")
        assert word_counts(path) == {"the": 7, "ice cream": 2}

    @pytest.mark.parametrize("line", ["word", "word x", "3", "word -3"])
    def test_a_broken_line(self, tmp_path, line):
        (tmp_path / "words.txt").write_text(f"a 1\n{line}\n")
        with pytest.raises(DataError, match=rf"words\.txt, line 2: '{line}'; expected a word, a space and a count"):
            word_counts(tmp_path / "words.txt")

    def test_no_file(self, tmp_path):
        with pytest.raises(DataError, match=r"no\.txt cannot be read"):
            word_counts(tmp_path / "no.txt")

    def test_of_an_installed_package_without_importing_it(self, tmp_path, monkeypatch):
        package = tmp_path / "textblob"
        (package / "en").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "en" / "en-spelling.txt").write_text("a 21155\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert word_counts() == {"a": 21155}

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr("lightning_interp.rate.texts.package_texts.find_spec", lambda name: None)
        with pytest.raises(RecipeError, match="package textblob, which is not installed"):
            word_counts()
