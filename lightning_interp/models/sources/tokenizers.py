"""Whether two models read text alike, and a tokenizer made of the words of some texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError

__all__ = ["check_same_tokenizer", "word_tokenizer"]

# Equal vocabularies can still split text differently; these strings show the usual differences.
_PROBES = (
    "The capital of France is Paris.",
    " two  spaces\tand\n\nlines ",
    "12345 3.14 1,000",
    "naïve Zürich 東京 🙂",
    "don't CamelCase snake_case",
)
_REMEDY = "Use two models of one family that share a tokenizer."

_PAD, _UNKNOWN, _END = "<|pad|>", "<|unknown|>", "<|end|>"
_WORD = r"[^\W\d_]+(?:'[^\W\d_]+)*"


def check_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers that do not give the same ids for the same text.

    Vocabularies and the ids of the begin and end tokens are compared in full, the way text is split on a set of
    probe strings. Chat templates and padding may differ.

    Args:
        a: One tokenizer.
        b: The other.

    Raises:
        IncompatibleModelError: With the first token, size or text that differs.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> check_same_tokenizer(byte_tokenizer(), byte_tokenizer())
    """
    if a is b:
        return
    _check_vocabularies(a, b)
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise IncompatibleModelError(f"The tokenizers differ: {name} is {ours} and {theirs}. {_REMEDY}")
    for text in _PROBES:
        ours, theirs = a(text).input_ids, b(text).input_ids
        if ours != theirs:
            raise IncompatibleModelError(
                f"The tokenizers split {text!r} differently: ids {ours[:8]}... and {theirs[:8]}... . {_REMEDY}"
            )


def _check_vocabularies(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours == theirs:
        return
    left, right = ({index: token for token, index in vocabulary.items()} for vocabulary in (ours, theirs))
    first = next(index for index in sorted({*left, *right}) if left.get(index) != right.get(index))
    raise IncompatibleModelError(
        f"The tokenizers differ: they have {len(ours)} and {len(theirs)} tokens, and the first that differs is "
        f"id {first}: {left.get(first)!r} and {right.get(first)!r}. {_REMEDY}"
    )


def word_tokenizer(texts: Iterable[str], *, min_count: int = 2) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of some texts, in lower case; all else (digits, marks) it does not see.

    Args:
        texts: The texts, those of the training alone.
        min_count: How often a word must occur; the others are unknown.

    Returns:
        The tokenizer, with an end token, an unknown one and one for padding.

    Raises:
        RecipeError: If ``min_count`` is below 1.
        DataError: If no word occurs that often.

    Example:
        >>> tokenizer = word_tokenizer(["Great flight, great crew!", "No crew?"], min_count=2)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("GREAT!!! crew 22 seats").input_ids)
        ['great', 'crew', '<|unknown|>']
    """
    if min_count < 1:
        raise RecipeError(f"word_tokenizer(min_count={min_count!r}): expected at least 1.")
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u2019", "'"), normalizers.Lowercase()])
    splitter = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    kept = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
    if not kept:
        raise DataError(
            f"No word occurs {min_count} times in the texts ({len(counts)} different words). Give more texts, or a "
            "smaller min_count."
        )
    vocabulary = {token: index for index, token in enumerate((_PAD, _UNKNOWN, _END, *kept))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PAD, unk_token=_UNKNOWN, eos_token=_END)
