"""What a steering vector does: likelihoods of held-out endings, harm to neutral text, and what the model writes.

Many strengths are rows of one forward pass; every number is relative to the same texts without steering.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_interp import All, ModelMap, Site
from lightning_interp.core.measure.statistics import Estimate, mean_interval
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.tokens.batches import packed, padded
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.figures import BLUE, ORANGE, band, heat_map, in_house_style, label, panels
from lightning_interp.generation import LocalSampler, TextRequest
from lightning_interp.steering import AddDirection, SteeringVector, text_features
from lightning_interp.steering.vectors.directions import encode_texts

from ._contrasts import ContrastItem

Advance = Callable[[int], object]


@dataclass(frozen=True)
class ScoredText:
    """Token ids, of which those from ``start`` on are scored."""

    ids: tuple[int, ...]
    start: int


def encode_items(tokenizer: Any, items: Sequence[ContrastItem]) -> list[ScoredText]:
    """Both texts of each item, positive and negative in turn; the endings are scored.

    Args:
        tokenizer: Of the model.
        items: The items.

    Returns:
        ``2 n`` texts.

    Raises:
        DataError: If an ending has no tokens of its own.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> [t.start for t in encode_items(byte_tokenizer(), [ContrastItem(" good", " bad", "so")])]
        [2, 2]
    """
    texts = [text for item in items for text in item.texts]
    prompts = [item.prompt for item in items for _ in range(2)]
    scored = []
    for ids, prompt, text in zip(encode_texts(tokenizer, texts), prompts, texts, strict=True):
        before = tokenizer(prompt)["input_ids"] if prompt else []
        shared = next((k for k, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
        start = max(1, shared)  # nothing predicts the first token
        if start >= len(ids):
            raise DataError(f"{text!r} has no token after its prompt {prompt!r}, so nothing of it can be scored.")
        scored.append(ScoredText(tuple(ids), start))
    return scored


def spread_layers(layers: int, count: int = 8) -> list[int]:
    """At most ``count`` layers from 1 on, evenly spread.

    Example:
        >>> spread_layers(30), spread_layers(4)
        ([1, 5, 9, 13, 17, 21, 25, 29], [1, 2, 3])
    """
    return list(range(1, layers, max(1, -(-(layers - 1) // count))))


def score_sweep(
    model: ModelMap,
    vector: SteeringVector,
    texts: Sequence[ScoredText],
    *,
    layers: Sequence[int],
    strengths: Sequence[float],
    token_budget: int = 2048,
    advance: Advance = lambda n: None,
) -> torch.Tensor:
    """Mean log-probability of each text's scored tokens, for every layer and strength.

    Args:
        model: The model.
        vector: Has ``resid_post`` of every layer that is asked for.
        texts: What to score.
        layers: Where the vector is added, one at a time, at every token.
        strengths: How strongly; all of them are rows of the same passes.
        token_budget: Most tokens of a pass, over texts and strengths.
        advance: Called with 1 after each layer.

    Returns:
        Nats a token, float64 ``[layers, strengths, texts]``.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> model_map, vector = ModelMap.build(tiny_model("llama")), SteeringVector({"resid_post.1": [1.0] * 32})
        >>> found = score_sweep(model_map, vector, [ScoredText((5, 6, 7), 1)], layers=[1], strengths=[0.0, 1.0])
        >>> tuple(found.shape)
        (1, 2, 1)
    """
    found = torch.zeros(len(layers), len(strengths), len(texts), dtype=torch.float64)
    batches = packed([len(text.ids) for text in texts], max(1, token_budget // len(strengths)))
    for place, layer in enumerate(layers):
        for numbers in batches:
            each = [strength for strength in strengths for _ in numbers]
            steer = AddDirection(vector, site=Site("resid_post", layer), strength=each, positions=All())
            with steer.attach(model), undisturbed(model.model):
                scores = _score(model, [texts[i] for i in numbers], len(strengths))
            found[place, :, numbers] = scores.double().cpu()
        advance(1)
    return found


def _score(model: ModelMap, texts: Sequence[ScoredText], copies: int) -> torch.Tensor:
    """``[copies, texts]``; the copies of one strength lie next to each other."""
    ids, mask = padded([text.ids for text in texts])
    device = next(model.model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    with torch.inference_mode():
        more = {"use_cache": False} if "use_cache" in inspect.signature(model.model.forward).parameters else {}
        logits = model.model(input_ids=ids.repeat(copies, 1), attention_mask=mask.repeat(copies, 1), **more).logits
        # One copy at a time: a second [rows, T, V] in float32 would be the largest thing in memory.
        told = [torch.nn.functional.cross_entropy(part[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
                for part in logits.chunk(copies)]  # fmt: skip
    starts = torch.tensor([text.start for text in texts], device=device)
    scored = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1], device=device) >= starts[:, None])
    return -(torch.stack(told) * scored).sum(-1) / scored.sum(-1)


def preferences(scores: torch.Tensor) -> torch.Tensor:
    """By how much each item's positive ending is likelier a token: ``[..., 2 n] -> [..., n]``."""
    return scores[..., 0::2] - scores[..., 1::2]


@dataclass(frozen=True)
class Cell:
    """One layer and strength: how far the preference moves, what neutral text loses, and the unsteered preference."""

    layer: int
    strength: float
    effect: Estimate
    damage: Estimate
    preferred: float

    def row(self) -> dict[str, Any]:
        """One printed row."""
        return {
            "layer": self.layer,
            "strength": self.strength,
            "effect (nats a token)": str(self.effect),
            "neutral text loses (nats a token)": str(self.damage),
            "perplexity ratio": float(torch.tensor(self.damage.value).exp()),
            "positive preferred": self.preferred,
            "items": self.effect.n,
        }


def cells(
    endings: torch.Tensor, neutral: torch.Tensor, layers: Sequence[int], strengths: Sequence[float]
) -> list[Cell]:
    """Effect and damage of every layer and strength, each against strength 0 of the same layer.

    Args:
        endings: From :func:`score_sweep` on :func:`encode_items`, ``[layers, strengths, 2 n]``.
        neutral: From :func:`score_sweep` on neutral texts.
        layers: Names of the first axis.
        strengths: Names of the second; holds 0.

    Returns:
        Row by row.
    """
    zero, moved = list(strengths).index(0.0), preferences(endings)
    found = []
    for i, layer in enumerate(layers):
        for j, strength in enumerate(strengths):
            effect = mean_interval((moved[i, j] - moved[i, zero]).tolist())
            damage = mean_interval((neutral[i, zero] - neutral[i, j]).tolist())
            found.append(Cell(layer, strength, effect, damage, float((moved[i, j] > 0).double().mean())))
    return found


def choose_cell(found: Sequence[Cell], *, max_damage: float) -> Cell:
    """The largest effect among cells that cost neutral text no more than ``max_damage``.

    Args:
        found: From :func:`cells`.
        max_damage: Nats a token.

    Returns:
        The cell.

    Raises:
        RecipeError: If every cell but those of strength 0 costs more.
    """
    allowed = [cell for cell in found if cell.strength != 0 and cell.damage.value <= max_damage]
    if not allowed:
        least = min((cell for cell in found if cell.strength != 0), key=lambda cell: cell.damage.value)
        raise RecipeError(
            f"No strength leaves neutral text within max_damage={max_damage:g} nats a token; the least harm is "
            f"{least.damage.value:.3g}, at layer {least.layer} and strength {least.strength:g}. Allow more, or add "
            "smaller strengths."
        )
    return max(allowed, key=lambda cell: cell.effect.value)


@dataclass(frozen=True, eq=False)
class TextProbe:
    """Reads a text with the unsteered model: 0 like the mean of the negative texts, 1 like that of the positive ones.

    Args:
        direction: From the negative to the positive mean, ``[d]``.
        negative: Mean of the negative texts along it.
        site: Where texts are read, as means over their tokens.
    """

    direction: torch.Tensor
    negative: float
    site: Site

    @classmethod
    def fit(cls, model: ModelMap, tokenizer: Any, items: Sequence[ContrastItem], site: Site) -> TextProbe:
        """Means of both sides' texts at a site.

        Raises:
            DataError: If both sides have the same mean.
        """
        sides = [_means(model, tokenizer, [item.texts[side] for item in items], site) for side in (0, 1)]
        gap = sides[0].mean(0) - sides[1].mean(0)
        if not bool(gap.any()):
            raise DataError(f"Both sides of the {len(items)} items have the same mean at {site}; nothing to read.")
        direction = gap / (gap @ gap)
        return cls(direction, float(sides[1].mean(0) @ direction), site)

    def read(self, model: ModelMap, tokenizer: Any, texts: Sequence[str]) -> list[float]:
        """The value of each text."""
        found: list[float] = (_means(model, tokenizer, texts, self.site) @ self.direction - self.negative).tolist()
        return found

    def accuracy(self, model: ModelMap, tokenizer: Any, items: Sequence[ContrastItem]) -> float:
        """Share of items whose positive text has the greater value."""
        values = [self.read(model, tokenizer, [item.texts[side] for item in items]) for side in (0, 1)]
        right = sum(int(a > b) for a, b in zip(values[0], values[1], strict=True))
        return right / len(items)


def write_sweep(
    model: ModelMap,
    tokenizer: Any,
    vector: SteeringVector,
    prompts: Sequence[str],
    *,
    layer: int,
    strengths: Sequence[float],
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Continue every prompt at every strength, greedily, in one batch.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        vector: The vector.
        prompts: What to continue.
        layer: Where it is added, at every token.
        strengths: How strongly.
        new_tokens: Length of the continuations.

    Returns:
        Rows ``{"strength", "prompt", "text"}``, strength by strength.
    """
    asked = [TextRequest(prompt=prompt, max_new_tokens=new_tokens, temperature=0.0) for prompt in prompts]
    each = [strength for strength in strengths for _ in prompts]
    steer = AddDirection(vector, site=Site("resid_post", layer), strength=each)
    with steer.attach(model):
        written = LocalSampler(model.model, tokenizer).write(asked * len(strengths))
    named = [(strength, prompt) for strength in strengths for prompt in prompts]
    return [{"strength": s, "prompt": p, "text": one.text} for (s, p), one in zip(named, written, strict=True)]


def _means(model: ModelMap, tokenizer: Any, texts: Sequence[str], site: Site) -> torch.Tensor:
    """Mean activation of each text over its tokens, float64 ``[texts, d]``; 0 for a text without tokens."""
    filled: Mapping[int, str] = {i: text for i, text in enumerate(texts) if text}
    width = int(model.config_value("hidden_size"))
    found = torch.zeros(len(texts), width, dtype=torch.float64)
    places = list(filled)
    for numbers, rows in text_features(model, tokenizer, list(filled.values()), [site], positions=All()):
        found[[places[n] for n in numbers]] = rows[site].double()
    return found


@in_house_style
def sweep_figure(found: Sequence[Cell], *, chosen: tuple[int, float] | None = None, title: str = "") -> Any:
    """Two maps, layers upwards: how far the preference moves, and what neutral text loses.

    Args:
        found: Cells of every layer and strength.
        chosen: Layer and strength that get a frame.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    layers = sorted({cell.layer for cell in found})
    strengths = sorted({cell.strength for cell in found})
    by_place = {(cell.layer, cell.strength): cell for cell in found}
    effects = [[by_place[layer, s].effect.value for s in strengths] for layer in layers]
    damage = [[max(by_place[layer, s].damage.value, 1e-3) for s in strengths] for layer in layers]
    largest = max(1e-9, *(abs(value) for row in effects for value in row))
    figure, axes = panels(2, size=(10, max(3.4, 0.34 * len(layers) + 1.9)), title=title, sharey=True)
    for axis, table, name, look in (
        (axes[0], effects, "effect: preference for the positive ending\n(nats a token, against strength 0)",
         {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}),
        (axes[1], damage, "cost: log-probability that neutral text loses\n(nats a token; below 0.001 shown as 0.001)",
         {"cmap": "viridis", "norm": LogNorm(1e-3, max(1e-2, *(v for row in damage for v in row)))}),
    ):  # fmt: skip
        heat_map(axis, table, [f"{s:g}" for s in strengths], **look)
        label(axis, "strength (1 = from the negative to the positive mean)", title=name)
        if chosen is not None:
            corner = (strengths.index(chosen[1]) - 0.5, layers.index(chosen[0]) - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.8))
    axes[0].set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes[0].set_ylabel("layer")
    return figure


@in_house_style
def layer_figure(found: Sequence[Cell], *, title: str = "") -> Any:
    """Effect and cost of one layer against the strength, with intervals over items and texts.

    Args:
        found: Cells of one layer.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    ordered = sorted(found, key=lambda cell: cell.strength)
    n = ordered[0].effect.n if ordered else 0
    figure, (left, right) = panels(2, size=(8.4, 3.6), title=f"{title}\n{n} held-out items; bands: 95 % intervals")
    strengths = [cell.strength for cell in ordered]
    band(left, strengths, [cell.effect for cell in ordered], BLUE)
    band(right, strengths, [cell.damage for cell in ordered], ORANGE)
    label(left, "strength", "effect (nats a token)", zero=True)
    label(right, "strength", "neutral text loses (nats a token)", zero=True)
    return figure
