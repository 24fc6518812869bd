"""Whether two models read text alike."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import IncompatibleModelError

__all__ = ["check_same_tokenizer"]

# Equal vocabularies can still split text differently; these strings show the usual differences.
_PROBES = (
    "The capital of France is Paris.",
    " two  spaces\tand\n\nlines ",
    "12345 3.14 1,000",
    "naïve Zürich 東京 🙂",
    "don't CamelCase snake_case",
)
_SPECIALS = ("bos_token_id", "eos_token_id")


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
    for name in _SPECIALS:
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise IncompatibleModelError(f"The tokenizers differ: {name} is {ours} and {theirs}. {_REMEDY}")
    for text in _PROBES:
        ours, theirs = a(text).input_ids, b(text).input_ids
        if ours != theirs:
            raise IncompatibleModelError(
                f"The tokenizers split {text!r} differently: ids {ours[:8]}... and {theirs[:8]}... . {_REMEDY}"
            )


_REMEDY = "Use two models of one family that share a tokenizer."


def _check_vocabularies(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours == theirs:
        return
    by_id = ({index: token for token, index in vocabulary.items()} for vocabulary in (ours, theirs))
    left, right = by_id
    first = next(index for index in sorted({*left, *right}) if left.get(index) != right.get(index))
    raise IncompatibleModelError(
        f"The tokenizers differ: they have {len(ours)} and {len(theirs)} tokens, and the first that differs is "
        f"id {first}: {left.get(first)!r} and {right.get(first)!r}. {_REMEDY}"
    )
