"""Choose layers by index, range, share or name."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_interp.errors import SiteError

__all__ = ["Layers", "resolve_layers"]

Layers = str | int | Sequence[str | int]


def resolve_layers(layers: Layers, count: int) -> frozenset[int]:
    """Turn a layer choice (see :class:`~lightning_interp.grafting.plan.GraftRule`) into block indices.

    Quarters have ``count // 4`` layers and the last one takes the rest; ``upper_half`` is the two last quarters,
    ``second_half`` begins at ``count // 2``.
    """
    if not isinstance(layers, str | int):
        return frozenset[int]().union(*(resolve_layers(part, count) for part in layers))
    quarter = count // 4
    named = {
        "all": range(count),
        "none": range(0),
        "Q1": range(quarter),
        "Q2": range(quarter, 2 * quarter),
        "Q3": range(2 * quarter, 3 * quarter),
        "Q4": range(3 * quarter, count),
        "lower_half": range(2 * quarter),
        "upper_half": range(2 * quarter, count),
        "second_half": range(count // 2, count),
    }
    found = named[str(layers)] if layers in named else _range(str(layers), count)
    if layers == "none":
        return frozenset()
    if not found or any(not 0 <= i < count for i in found):
        raise SiteError(
            f"Cannot take layers {layers!r} of a model with layers 0 to {count - 1}. Expected an index, 'first-last', "
            f"a share such as '0.5-1.0', a list of these, or one of: {', '.join(named)}."
        )
    return frozenset(found)


def _range(text: str, count: int) -> range:
    try:
        if text.lstrip("-").isdigit():
            index = int(text)
            return range(index % count, index % count + 1) if -count <= index < count else range(0)
        first, _, last = text.partition("-")
        if "." in text:
            return range(round(float(first) * count), round(float(last) * count))
        return range(int(first), int(last) + 1)
    except ValueError:
        return range(0)
