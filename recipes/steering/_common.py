"""What the steering recipes share: texts from a file or the model itself, a concept's pairs, and bands in figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.core.storage.jsonl import text_lines
from lightning_interp.core.storage.row_files import file_rows
from lightning_interp.errors import DataError
from lightning_interp.generation import LocalSampler, TextRequest
from lightning_interp.steering import CounterfactualPairs, pairs_from_vocabulary, read_head

OPENINGS = (
    "The", "It was", "In the morning", "She said that", "There are", "When I was", "One of the", "They want to",
    "We have", "If you", "He went to", "The best way to", "My friend", "On Monday,", "At the end of", "Most people",
    "A good", "The children", "To make", "Last year", "For a long time", "You can", "The city", "Every day",
)  # fmt: skip
_BATCH = 16


TERMS = {
    "dual": "dual steering: moves the next-token distribution along straight lines of expected token vectors, so that "
    "what is not asked for changes least in KL divergence",
    "euclidean": "Euclidean steering: adds a multiple of the direction to the last hidden state",
    "unsteered": "the model as it is",
    "dual_md": "a probe made of the difference of the two sides' mean dual coordinates (expected token vectors)",
    "primal_md": "a probe made of the difference of the two sides' mean hidden states",
    "P(W=1)": "the concept's probability: that of the target tokens among all tokens of the pairs",
    "off_target_kl": "how far the distribution inside everything but the concept has moved, in nats; 0 is not at all",
    "pair_mass": "probability of all tokens of the pairs together; best where it stays as it was",
    "rank_difference": "how far the order of the other tokens has changed; 0 is not at all",
    "total_kl": "KL divergence of the steered distribution from the unsteered one, in nats, the concept included",
    "KL": "divergence of the steered next-token distribution from the unsteered one, in nats: what steering costs",
    "oracle": "what no steering can do better: the pairs alone exchange probability, and nothing else moves",
    "alpha": "regularisation of dual steering where the distribution is peaked",
    "pair_share": "share of target tokens among the written tokens of pairs; 0.5 where there is none",
    "perplexity": "how surprising the text is to the unsteered model; low may also mean repetitive",
    "distinct_2": "share of different word pairs in a text",
    "repeated_4": "share of four-token pieces that come again",
    "products a steered token": "products of a Hessian with a vector that the solver took: what it costs to compute",
    "[a, b]": "95 % interval",
}
"""What the names in tables and figures mean, for readers of a report alone."""

_CONCEPTS = {
    "letters": "upper-case letters (the target) against lower-case ones (the base)",
    "capitalised": "words with a capital (the target) against without (the base)",
    "number_digit": "numbers in digits (the target) against in words (the base)",
    "verb_ing": "verbs with -ing (the target) against infinitives (the base)",
    "verb_past": "verbs with -ed (the target) against infinitives (the base)",
    "verb_third": "verbs with -s (the target) against infinitives (the base)",
}


def concept_term(concept: str, pairs: int) -> dict[str, str]:
    """What a concept is, for the terms of a report."""
    return {
        "concept": f"{concept!r}, {_CONCEPTS.get(concept, 'target words against base words')}: {pairs} pairs of tokens"
    }


def moved(effect: Estimate, up: str, down: str, still: str) -> str:
    """The words that the interval of an effect allows."""
    return up if effect.low > 0 else down if effect.high < 0 else still


def differs(gap: Estimate) -> str:
    """How dual and Euclidean steering differ, no more than the interval says."""
    return f"dual minus Euclidean: {gap}, {moved(gap, 'dual is higher', 'dual is lower', 'no difference is shown')}"


def concept_pairs(tokenizer: Any, concept: str) -> CounterfactualPairs:
    """Pairs of a concept: made from the vocabulary by a rule, or read from a file.

    Args:
        tokenizer: Of the model.
        concept: A kind of ``pairs_from_vocabulary``; ``letters`` (lower-case
            against upper-case single letters, which byte tokenizers have too); or a JSON file that maps base strings to
            target strings.

    Returns:
        The pairs.

    Raises:
        DataError: If the file cannot be read, or no pair is left.
        RecipeError: If the kind is unknown.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> len(concept_pairs(byte_tokenizer(), "letters"))
        26
    """
    if concept == "letters":
        letters = {chr(97 + i): chr(65 + i) for i in range(26)}
        return CounterfactualPairs.from_strings(letters, tokenizer, name=concept, missing="drop")
    if not concept.endswith(".json"):
        return pairs_from_vocabulary(tokenizer, concept)  # type: ignore[arg-type]
    table = read_json(concept, expected="a JSON object of strings")
    return CounterfactualPairs.from_strings(table, tokenizer, name=Path(concept).stem, missing="drop")


def concept_direction(model: Any, pairs: CounterfactualPairs) -> Tensor:
    """Mean difference of the unembedding's rows of the two sides, of length 1.

    Args:
        model: The model.
        pairs: The concept.

    Returns:
        ``[d]``.
    """
    weight = read_head(model).weight.detach().float()
    difference = weight[pairs.target_ids].mean(0) - weight[pairs.base_ids].mean(0)
    unit: Tensor = difference / difference.norm()
    return unit


def read_texts(path: str) -> list[str]:
    """Texts of a user: one a line, or rows with ``text`` (JSONL, CSV, Parquet).

    Raises:
        DataError: With file and line.
    """
    expected = "one text a line, or rows with 'text'"
    found: list[tuple[str, Any]]
    if Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        found = [(where, row.get("text")) for where, row in file_rows(path, expected=expected)]
    else:
        found = list(text_lines(path, expected=expected))
    for where, text in found:
        if not isinstance(text, str):
            raise DataError(f"{where}: 'text' is {text!r:.60}; expected a string.")
    if not (kept := [text for _, text in found if text.strip()]):
        raise DataError(f"{path} holds no text. Expected {expected}.")
    return kept


def sample_texts(
    model: Any, tokenizer: Any, *, count: int, length: int, seed: int, advance: Callable[[int], object] = lambda n: None
) -> list[str]:
    """Texts that the model writes itself, after short openings: real text of its own kind, and nothing to download.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        count: Texts.
        length: New tokens of each.
        seed: Root seed; each text has random numbers of its own.
        advance: Called with the number of texts just written.

    Returns:
        The texts, openings included.
    """
    sampler = LocalSampler(model, tokenizer, batch_size=_BATCH)
    asked = [
        TextRequest(prompt=OPENINGS[i % len(OPENINGS)], max_new_tokens=length, seed=seed, key=("texts", i))
        for i in range(count)
    ]
    written: list[str] = []
    for part in (asked[i : i + _BATCH] for i in range(0, count, _BATCH)):
        written += [one.text + (found.text or "") for one, found in zip(part, sampler.generate(part), strict=True)]
        advance(len(part))
    return written


def texts_or_samples(
    source: str, path: str, *, count: int, length: int, seed: int, progress: Callable[..., Any]
) -> list[str]:
    """The texts of a file, or else as many as wanted that the model writes itself.

    Args:
        source: Of the model, as :func:`~lightning_interp.models.load_causal_lm` takes it.
        path: For :func:`read_texts`; empty to let the model write.
        count: As in :func:`sample_texts`, like ``length`` and ``seed``.
        length: New tokens of each.
        seed: Root seed.
        progress: A recipe run's ``progress``.

    Returns:
        The texts.
    """
    from lightning_interp import load_causal_lm

    if path:
        return read_texts(path)
    loaded = load_causal_lm(source)
    with progress("writing texts", total=count) as bar:
        return sample_texts(loaded.model, loaded.tokenizer, count=count, length=length, seed=seed, advance=bar.advance)
