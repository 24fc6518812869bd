"""Counterfactual pairs made from a tokenizer's own vocabulary by rules of English spelling; no word list is read.

The rules are those of regular inflection, so they miss irregular forms and let some rare word through. Which pairs
matter is decided later by the model: only contexts whose most probable tokens are all on one side are used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.concepts.pairs import MARKS, CounterfactualPairs

__all__ = ["PairKind", "pairs_from_vocabulary", "word_tokens"]

PairKind = Literal["capitalised", "number_digit", "verb_ing", "verb_past", "verb_third"]

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety hundred"
_NUMBERS = {word: str(number) for number, word in enumerate(_UNITS.split())} | {
    word: str(10 * number) for number, word in enumerate(_TENS.split(), start=1)
}

# Verbs whose past is not base + ed, so that -ing and -s are all the evidence there is.
_IRREGULAR = frozenset(
    """become begin bend bind bite bleed blow break breed bring build buy catch choose cling come cost creep cut deal
    dig draw drink drive eat fall feed feel fight find flee fly forbid forget forgive freeze get give go grind grow have
    hear hide hit hold hurt keep know lay lead leave lend let lie lose make mean meet overcome pay put quit read ride
    rise run say seek sell send set shake shed shine shoot show shrink shut sing sink sit sleep slide speak spend spin
    spit split spread spring stand steal stick sting strike strive swear sweep swell swim swing take teach tear tell
    think throw undergo understand undertake undo wake wear weave weep win withdraw write""".split()
)
_MODAL = frozenset({"can", "will", "may", "might", "must", "shall"})  # " cans" and " canning" are of another word
_VOWEL = re.compile(r"[aeiouy]")
_DOUBLING = re.compile(r"[aeiou][bdgklmnprtvz]$")  # and the letter before is no vowel


def pairs_from_vocabulary(tokenizer: Any, kind: PairKind) -> CounterfactualPairs:
    """All pairs of one kind whose two sides are single tokens.

    - ``capitalised``: `` word`` and `` Word``, at least two ASCII letters after a leading space. Pieces of words
      (`` lig``) are in it, and words that a capital changes (`` may``).
    - ``number_digit``: a number word (zero to twenty, and the tens to ninety; lower or upper first letter) and its
      digits, both with a leading space or both without. Many tokenizers write digits one by one and never with a space.
    - ``verb_ing``, ``verb_past``, ``verb_third``: a verb and its -ing, -ed or -s form, after a leading space and in
      lower case, by the rules of English spelling. To be taken for a verb a base needs all three forms in the
      vocabulary, or to stand in a short list of irregular verbs and have the -ing and -s forms. Two bases that would
      share a form (``aid`` and ``aide``) are both dropped and counted under ``ambiguous``. Nouns that happen to have
      verb forms stay in.

    Args:
        tokenizer: Of the model; its vocabulary must write a leading space as ``Ġ`` or ``▁``.
        kind: Which pairs; the base side is the plain form (lower case, number word, infinitive).

    Returns:
        The pairs, in the order of base tokens.

    Raises:
        RecipeError: If the kind is unknown.
        DataError: If the vocabulary has no such pair.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = "run runs running hope hopes hoped hoping".split()
        >>> model = models.WordLevel({f"Ġ{word}": i for i, word in enumerate(words)}, unk_token="Ġrun")
        >>> pairs_from_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), "verb_ing").texts
        ((' run', ' running'), (' hope', ' hoping'))
    """
    if kind not in get_args(PairKind):
        raise RecipeError(f"Unknown kind of pairs {kind!r}; expected one of {', '.join(get_args(PairKind))}.")
    spaced: dict[str, int] = {}
    bare: dict[str, int] = {}
    for index, text, space in word_tokens(tokenizer):
        (spaced if space else bare)[text] = index
    if kind == "capitalised":
        found, dropped = _among(spaced, ((word, word.capitalize()) for word in spaced if _lower(word, 2))), 0
    elif kind == "number_digit":
        spellings = [(form, n) for word, n in _NUMBERS.items() for form in (word, word.capitalize())]
        found, dropped = [*_among(spaced, spellings), *_among(bare, spellings, "")], 0
    else:
        forms = _verbs(spaced, kind)
        uses = Counter(forms.values())
        kept = [(base, form) for base, form in forms.items() if uses[form] == 1 and form not in forms]
        found, dropped = _among(spaced, kept), len(forms) - len(kept)
    if not found:
        raise DataError(
            f"The vocabulary of {type(tokenizer).__name__} ({len(tokenizer)} tokens) has no pair of kind {kind!r}. "
            "Choose another kind, or give pairs with CounterfactualPairs.from_strings."
        )
    found.sort()
    counts = {"ambiguous": dropped} if dropped else {}
    return CounterfactualPairs([pair for pair, _ in found], kind, [texts for _, texts in found], counts)


_Found = list[tuple[tuple[int, int], tuple[str, str]]]


def _among(words: dict[str, int], pairs: Iterable[tuple[str, str]], space: str = " ") -> _Found:
    """The pairs of which both sides are words, as ids and as texts."""
    return [((words[a], words[b]), (space + a, space + b)) for a, b in pairs if a in words and b in words]


def _lower(word: str, least: int) -> bool:
    return len(word) >= least and word.isalpha() and word.islower()


def _verbs(words: dict[str, int], kind: str) -> dict[str, str]:
    rules: dict[str, Callable[[str], list[str]]] = {"verb_ing": _ing, "verb_past": _past, "verb_third": _third}
    forms = {base: next((form for form in rules[kind](base) if form in words), None) for base in words}
    return {base: form for base, form in forms.items() if form is not None and _is_verb(base, words)}


def _is_verb(base: str, words: dict[str, int]) -> bool:
    short = len(base) < 3 or not _VOWEL.search(base)
    if (short and base not in _IRREGULAR) or not _lower(base, 1) or base in _MODAL:
        return False
    forms = [_ing, _third] if base in _IRREGULAR else [_ing, _third, _past]
    return all(any(form in words for form in rule(base)) for rule in forms)


def _ing(base: str) -> list[str]:
    if base.endswith("ie"):
        return [base[:-2] + "ying"]
    if base.endswith("e") and not base.endswith(("ee", "oe", "ye")):
        return [base[:-1] + "ing"]
    return [stem + "ing" for stem in _stems(base)]


def _past(base: str) -> list[str]:
    if base.endswith("e"):
        return [base + "d"]
    if re.search(r"[^aeiou]y$", base):
        return [base[:-1] + "ied"]
    return [stem + "ed" for stem in _stems(base)]


def _third(base: str) -> list[str]:
    if base == "have":
        return ["has"]
    if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", base):
        return [base + "es"]
    if re.search(r"[^aeiou]y$", base):
        return [base[:-1] + "ies"]
    return [base + "s"]


def _stems(base: str) -> list[str]:
    """What an ending with a vowel is put to: a final consonant doubles in short words, and in some longer ones."""
    if not _DOUBLING.search(base) or base[-3:-2] in "aeiou":
        return [base]
    doubled = base + base[-1]
    short = len(re.findall(r"[aeiouy]+", base)) == 1
    return [doubled] if short else [base, doubled]


def word_tokens(tokenizer: Any) -> Iterator[tuple[int, str, bool]]:
    """Id, text and leading space of the tokens that are ASCII letters or digits, in the order of ids."""
    special = set(tokenizer.all_special_ids)
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        spaced = token.startswith(MARKS)
        text = token[1:] if spaced else token
        if index not in special and text.isascii() and text.isalnum():
            yield index, text, spaced
