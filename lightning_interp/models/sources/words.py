"""A tokenizer made of the words of some texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_interp.errors import DataError, RecipeError

__all__ = ["word_tokenizer"]

_PAD, _UNKNOWN, _END = "<|pad|>", "<|unknown|>", "<|end|>"
_WORD = r"[^\W\d_]+(?:'[^\W\d_]+)*"


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
    kept = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    if not kept:
        raise DataError(
            f"No word occurs {min_count} times in the texts ({len(counts)} different words). Give more texts, or a "
            "smaller min_count."
        )
    vocabulary = {token: index for index, token in enumerate((_PAD, _UNKNOWN, _END, *kept))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PAD, unk_token=_UNKNOWN, eos_token=_END)
