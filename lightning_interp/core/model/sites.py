"""Where in a decoder an activation lives, and which layers are meant: one vocabulary for every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_interp.errors import SiteError

__all__ = ["GLOBAL_KINDS", "LAYER_KINDS", "Layers", "Site", "resolve_layers"]

LAYER_KINDS = ("resid_pre", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out")
"""Kinds that need a layer index."""

GLOBAL_KINDS = ("final_norm", "unembed_in", "logits")
"""Kinds of which a model has one."""

_LINEAR = "linear:"

Layers = str | int | Sequence[str | int]


@dataclass(frozen=True, order=True)
class Site:
    """One place in a decoder where an activation can be read or replaced.

    ``resid_pre`` and ``resid_post`` are the residual stream before and after a block, ``attn_in`` and ``mlp_in``
    what the sub-layer receives, ``attn_out`` and ``mlp_out`` what it adds to the residual stream,
    ``final_norm`` the output of the last norm, ``unembed_in`` what the head multiplies (``[B, n, d]``, of the last
    ``n`` columns where a caller asks for fewer logits), ``logits`` the head's output, and ``linear:<component>`` the
    output of one canonical component (``linear:q``, ``linear:down``, ``linear:embed``, ...); of a map inside of a block
    before any norm that follows it, as of queries and keys.

    Args:
        kind: The kind of site.
        layer: Block index, counted from 0; negative counts from the end. None for sites of which there is one.

    Raises:
        SiteError: If the kind is unknown, or a layer is missing or not wanted.

    Example:
        >>> Site("resid_post", 12)
        Site(kind='resid_post', layer=12)
        >>> str(Site("linear:q", 3)), Site.parse("mlp_out.1") == Site("mlp_out", 1)
        ('linear:q.3', True)
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*LAYER_KINDS, *GLOBAL_KINDS) and not self.kind.startswith(_LINEAR):
            known = ", ".join((*LAYER_KINDS, *GLOBAL_KINDS, "linear:<component>"))
            raise SiteError(f"Unknown site kind {self.kind!r}. Expected one of: {known}.")
        if self.kind == _LINEAR:
            raise SiteError(f"Site {self.kind!r} names no component. Expected a name after it, as in 'linear:q'.")
        if self.layer is not None and (not isinstance(self.layer, int) or isinstance(self.layer, bool)):
            raise SiteError(f"Site {self.kind!r} has layer={self.layer!r}; expected an index such as 12 or -1.")
        if self.kind in LAYER_KINDS and self.layer is None:
            raise SiteError(f"Site {self.kind!r} needs a layer, as in Site({self.kind!r}, 0).")
        if self.kind in GLOBAL_KINDS and self.layer is not None:
            raise SiteError(f"Site {self.kind!r} has no layers, but got layer={self.layer}. Leave the layer out.")

    @property
    def component(self) -> str | None:
        """Canonical component name of a ``linear:`` site, otherwise None."""
        return self.kind.removeprefix(_LINEAR) if self.kind.startswith(_LINEAR) else None

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``kind`` or ``kind.layer``, the form that ``str(site)`` gives.

        Args:
            text: For example ``"resid_post.12"`` or ``"logits"``.

        Returns:
            The site.

        Raises:
            SiteError: If the text names no site.
        """
        kind, dot, layer = text.rpartition(".")
        if not dot:
            return cls(text)
        try:
            return cls(kind, int(layer))
        except ValueError as error:
            raise SiteError(
                f"Cannot read a site from {text!r}. Expected 'kind' or 'kind.layer', as in 'resid_post.12'."
            ) from error

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


def resolve_layers(layers: Layers, count: int) -> frozenset[int]:
    """Turn a layer choice (see :class:`~lightning_interp.grafting.plan.GraftRule`) into block indices.

    Quarters have ``count // 4`` layers and the last one takes the rest; ``upper_half`` is the two last quarters,
    ``second_half`` begins at ``count // 2``, where ``early`` ends.
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
        "early": range(count // 2),
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
