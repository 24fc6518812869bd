"""What steering recipes share: text from the model itself, states of a concept, and paths of steered states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.measure.seeding import derived_seed, seeded_rng
from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.core.storage.jsonl import json_lines, text_lines
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.concepts.vocabulary import pairs_from_vocabulary
from lightning_interp.steering.effects.metrics import score_path
from lightning_interp.steering.effects.path_scores import SteeringResult
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.dual import dual_steer
from lightning_interp.steering.softmax.euclidean import euclidean_steer
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

__all__ = ["concept_pairs", "read_texts", "sample_texts", "sides_of_texts", "steered_paths", "texts_or_samples"]

OPENINGS = (
    "The", "It was", "In the morning", "She said that", "There are", "When I was", "One of the", "They want to",
    "We have", "If you", "He went to", "The best way to", "My friend", "On Monday,", "At the end of", "Most people",
    "A good", "The children", "To make", "Last year", "For a long time", "You can", "The city", "Every day",
)  # fmt: skip
_BATCH = 16


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


def read_texts(path: str) -> list[str]:
    """Texts of a user: one a line, or JSONL with ``text``.

    Raises:
        DataError: With file and line.
    """
    expected = "one text a line, or JSONL with 'text'"
    found: list[tuple[str, Any]] = list(text_lines(path, expected=expected)) if not path.endswith(".jsonl") else []
    if path.endswith(".jsonl"):
        found = [(where, row.get("text")) for where, row in json_lines(path, expected=expected)]
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
        tokenizer: Its tokenizer, which pads on the left.
        count: Texts.
        length: New tokens of each.
        seed: Root seed; each batch has generators of its own.
        advance: Called with the number of texts just written.

    Returns:
        The texts, openings included.
    """
    written: list[str] = []
    for begin in range(0, count, _BATCH):
        opened = [OPENINGS[i % len(OPENINGS)] for i in range(begin, min(count, begin + _BATCH))]
        batch = tokenizer(opened, return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad(), seeded_rng(derived_seed(seed, "texts", begin), model.device):
            out = model.generate(
                **batch, max_new_tokens=length, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id or 0
            )
        written += tokenizer.batch_decode(out, skip_special_tokens=True)
        advance(len(opened))
    return written


def texts_or_samples(
    source: str, path: str, *, count: int, length: int, seed: int, progress: Callable[..., Any]
) -> list[str]:
    """The texts of a file, or else as many as wanted that the model writes itself.

    Args:
        source: Of the model, as :func:`~lightning_interp.models.load_causal_lm` takes it.
        path: For :func:`read_texts`; empty to let the model write.
        count: As in :func:`sample_texts`.
        length: As in :func:`sample_texts`.
        seed: As in :func:`sample_texts`.
        progress: A recipe run's ``progress``.

    Returns:
        The texts.
    """
    from lightning_interp.models.sources.loading import load_causal_lm

    if path:
        return read_texts(path)
    loaded = load_causal_lm(source)
    loaded.tokenizer.padding_side = "left"
    with progress("writing texts", total=count) as bar:
        return sample_texts(loaded.model, loaded.tokenizer, count=count, length=length, seed=seed, advance=bar.advance)


def sides_of_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    pairs: CounterfactualPairs,
    geometry: SoftmaxGeometry,
    *,
    top: int,
    mass: float,
    length: int = 128,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, Tensor, int]:
    """States at which the model predicts the concept's base side, and those at which it predicts the target side.

    A state is chosen if its ``top`` likeliest tokens are all of one side and hold at least ``mass`` together (the
    rule of arXiv 2602.15293, appendix B.1, with ``top=3`` and ``mass=0.7``).

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Where to look; every token of every text is a context.
        pairs: The concept.
        geometry: Of the model's head.
        top: See above.
        mass: See above.
        length: Tokens of a text that are read.
        advance: Called with the number of texts just read.

    Returns:
        Base states ``[n0, d]``, target states ``[n1, d]``, and how many contexts were looked at.
    """
    capture, head = ActivationCapture([Site("unembed_in")]), Site("unembed_in")
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    seen = 0
    members = [torch.zeros(geometry.vocabulary, dtype=torch.bool) for _ in sides]
    for member, ids in zip(members, (pairs.base_ids, pairs.target_ids), strict=True):
        member[ids] = True
    with capture.attach(model), torch.no_grad():
        for text in texts:
            ids = tokenizer([text], return_tensors="pt", truncation=True, max_length=length).input_ids.to(model.device)
            model(input_ids=ids, use_cache=False)
            states = capture.activations[head][0].float().cpu()
            best = geometry.log_probs(states).exp().topk(top, dim=-1)
            for side, member in zip(sides, members, strict=True):
                chosen = member[best.indices].all(-1) & (best.values.sum(-1) >= mass)
                side.append(states[chosen])
            seen += len(states)
            advance(1)
    return torch.cat(sides[0]), torch.cat(sides[1]), seen


def steered_paths(
    geometry: SoftmaxGeometry,
    pairs: CounterfactualPairs,
    starts: Tensor,
    probes: Mapping[str, Any],
    grid: Sequence[float],
    *,
    alpha: float | Literal["auto"],
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[SteeringResult, dict[str, float]]:
    """Score dual and Euclidean paths from some states to a grid of ``P(W=1)``, and the oracle that re-splits pairs.

    Each point is solved for directly; a point that cannot be reached is left out of its path.

    Args:
        geometry: Of the head.
        pairs: The concept.
        starts: Base states ``[n, d]``.
        probes: By name.
        grid: Values of ``P(W=1)``, ascending.
        alpha: Regularisation of dual steering.
        advance: Called with the number of grid points just solved.

    Returns:
        Scored paths of ``dual <probe>``, ``euclidean <probe>`` and ``oracle``, one a context; and by method the share
        of points that were reached.

    Raises:
        RecipeError: If there is no start.
    """
    if not len(starts):
        raise RecipeError("steered_paths() got no state to start from; expected at least one.")
    options, found, shares = SolverOptions(target_rtol=5e-3), {}, {}
    for name, probe in probes.items():
        for method in ("dual", "euclidean"):
            points = []
            for wanted in grid:
                target: dict[str, Any] = {"target_prob": wanted, "pairs": pairs}
                points.append(
                    dual_steer(geometry, starts, probe, alpha=alpha, options=options, **target)
                    if method == "dual"
                    else euclidean_steer(geometry, starts, probe, **target)
                )
                advance(1)
            key = f"{method} {name}"
            shares[key] = float(torch.stack([point.reached for point in points]).float().mean())
            found[key] = {
                row: _scored(geometry, pairs, starts[row], [p for p in points if bool(p.reached[row])], row, probe)
                for row in range(len(starts))
            }
    found["oracle"] = {row: _oracle(geometry, pairs, starts[row], grid) for row in range(len(starts))}
    return SteeringResult(found), shares


def _scored(
    geometry: SoftmaxGeometry, pairs: CounterfactualPairs, start: Tensor, points: Sequence[Any], row: int, probe: Any
) -> dict[str, Tensor]:
    states = torch.stack([start, *(point.lam[row].to(start) for point in points)])
    hvps = torch.tensor([0.0, *(float(point.hvps[row]) for point in points)])
    return score_path(geometry, states, pairs, probe=probe, hvps=hvps)


def _oracle(
    geometry: SoftmaxGeometry, pairs: CounterfactualPairs, start: Tensor, grid: Sequence[float]
) -> dict[str, Tensor]:
    """The bound of every method that only sees the output: pairs re-split, everything else untouched."""
    p0 = geometry.log_probs(start).exp()
    points = [p0, *(pairs.resplit(p0, w) for w in grid)]
    z0 = pairs.regroup(p0)
    return {
        "target_prob": torch.stack([pairs.target_prob(p) for p in points]).double(),
        "pair_mass": torch.stack([pairs.pair_mass(p) for p in points]).double(),
        "off_target_kl": torch.stack([_kl(z0, pairs.regroup(p)) for p in points]).double(),
        "rank_difference": torch.zeros(len(points), dtype=torch.float64),
        "total_kl": torch.stack([_kl(p0, p) for p in points]).double(),
    }


def _kl(p: Tensor, q: Tensor) -> Tensor:
    kept = p > 0
    return (p[kept] * (p[kept] / q[kept]).log()).sum().clamp_min(0)
