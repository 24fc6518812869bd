"""Where an adapter is on, as plain data: tokens, modules, layers, and a policy for generated tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import groupby
from typing import Any, Literal, get_args

from lightning_interp.core.model.components import BLOCK_COMPONENTS, GLOBAL_COMPONENTS
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Layers, resolve_layers
from lightning_interp.core.tokens.positions import (
    All,
    ChatTemplate,
    Generated,
    Last,
    Positions,
    Span,
    Substring,
    Tokens,
)
from lightning_interp.core.weights.cells import Cell, cells_of
from lightning_interp.errors import PositionError, RecipeError

__all__ = ["GATE_MODULES", "Decode", "GateSpec", "named_gates", "shared_with_train"]

Decode = Literal["outside_q", "spec_mask", "off"]

GATE_MODULES: Mapping[str, tuple[str, ...]] = {
    "attn": ("q", "k", "v", "qkv", "o"),
    "ffn": ("gate", "up", "gate_up", "down", "moe"),
}
"""Presets of modules."""

_LOCATORS: Mapping[str, Callable[..., Positions]] = {
    "substring": lambda text, which="first": Substring(text, which, missing="ignore"),
    # What the caller never wrote: marks, and a system text that the template puts there by itself.
    "chat_template": lambda: ChatTemplate("template") | ChatTemplate("inserted"),
    "system": lambda: ChatTemplate("system"),
    "user": lambda: ChatTemplate("user"),
    "assistant": lambda: ChatTemplate("assistant"),
    "generation_prompt": lambda: ChatTemplate("generation_prompt"),
    "last": lambda n=1: Last(n),
    "shared_with_train": lambda ids: Tokens(ids) & ~(ChatTemplate("user") | ChatTemplate("assistant")),
}


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """Where an adapter is on, as plain data.

    With Q for the prompt's tokens that ``tokens`` finds, and the mask for ``modules`` in ``layers``:

    ========== =================== =================== ===================
    spec       on in Q             on elsewhere        generated tokens
    ========== =================== =================== ===================
    plain      mask                nothing             nothing
    invert     nothing             mask                mask
    complement all but the mask    everything          everything
    no tokens  mask                mask                mask
    ========== =================== =================== ===================

    Args:
        tokens: None for every token; indices (negative ones count from the prompt's end, those outside are dropped); a
            piece of text, of which the first mention counts; any :class:`Positions`; or a mapping with ``kind``:
            ``substring`` (``text``, ``which`` first, last or all), ``chat_template`` (what the caller did not write),
            ``system``, ``user``, ``assistant`` (what that role said), ``generation_prompt`` (what opens the answer),
            ``last`` (``n``), ``shared_with_train`` (``ids``, see :func:`shared_with_train`), or a class of positions.
        invert: On in the mask everywhere but in Q.
        complement: On everywhere but in the mask within Q.
        modules: Presets (see ``GATE_MODULES``) and canonical names of components, or None for all.
        layers: As in a graft rule, such as ``early`` (the first half) or ``[0, 3]``; None for all.
        decode: Generated tokens: as tokens outside of Q (the last column above), the ``spec_mask`` as in Q (of
            ``invert``: as elsewhere), or ``off``.

    Raises:
        RecipeError: If a field has a wrong value, or fields contradict each other.

    Example:
        >>> spec = GateSpec(tokens="Qwen", modules="attn", layers="early")
        >>> spec.to_dict()
        {'tokens': 'Qwen', 'modules': 'attn', 'layers': 'early'}
        >>> GateSpec.from_dict({"tokens": {"kind": "last"}, "invert": True}) == GateSpec(tokens=Last(), invert=True)
        True
    """

    tokens: Any = None
    invert: bool = False
    complement: bool = False
    modules: Any = None
    layers: Layers | None = None
    decode: Decode = "outside_q"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _read_tokens(self.tokens))
        object.__setattr__(self, "modules", _read_modules(self.modules))
        layers = self.layers
        if layers is not None and not isinstance(layers, str | int) and isinstance(layers, Iterable):
            object.__setattr__(self, "layers", tuple(sorted(layers, key=str)))
        if isinstance(self.layers, bool) or not isinstance(self.layers, str | int | tuple | None):
            raise RecipeError(
                f"GateSpec(layers={layers!r}): expected None, an index, a name such as 'early', or a list."
            )
        if self.decode not in get_args(Decode):
            raise RecipeError(f"GateSpec(decode={self.decode!r}): expected {', '.join(get_args(Decode))}.")
        if self.invert and self.complement:
            raise RecipeError(
                "GateSpec(invert=True, complement=True): invert keeps the mask and turns the tokens round, complement "
                "turns the cells round. Choose one."
            )
        if self.invert and self.tokens is None:
            raise RecipeError("GateSpec(invert=True) without tokens is on nowhere. Name tokens, or say tokens=[].")

    @property
    def positions(self) -> Positions:
        """Q, as a selector."""
        if self.tokens is None:
            return All()
        if isinstance(self.tokens, str):
            return Substring(self.tokens, missing="ignore")
        if isinstance(self.tokens, Positions):
            return self.tokens
        nothing: Positions = Span(0, 0, strict=False)
        return reduce(operator.or_, _spans(self.tokens), nothing)

    def cells(self, model_map: ModelMap) -> frozenset[Cell]:
        """The mask in a model: its components in its layers; all there are with neither.

        Raises:
            SiteError: If the model has no such layer, or none of a component.
        """
        layers = resolve_layers("all" if self.layers is None else self.layers, len(model_map))
        if self.modules is None:
            every = {(name, at) for name, at, _ in model_map.cells()}
            return frozenset(cell for cell in every if self.layers is None or cell[1] in layers)
        names = (self.modules,) if isinstance(self.modules, str) else self.modules
        found = [
            cells_of(model_map, name, GATE_MODULES.get(name, (name,)), layers, shared=name not in GATE_MODULES)
            for name in names
        ]
        return frozenset[Cell]().union(*found if layers else ())

    def to_dict(self) -> dict[str, Any]:
        """Plain data without what is as by default."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {
            key: value.to_dict() if isinstance(value, Positions) else list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateSpec:
        """Read what :meth:`to_dict` wrote, or what stands in a YAML file.

        Raises:
            RecipeError: If it is no mapping, or a key is unknown.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or set(data) - set(known):
            wrong = sorted(map(str, set(data) - set(known))) if isinstance(data, Mapping) else data
            raise RecipeError(f"Cannot read a gate from {wrong!r}. Expected a mapping with keys {', '.join(known)}.")
        return cls(**data)


def _read_tokens(tokens: Any) -> Any:
    if isinstance(tokens, Mapping):
        tokens = _located(**tokens)
    if tokens is None or isinstance(tokens, Positions):
        if isinstance(tokens, Generated):
            raise RecipeError(
                f"GateSpec(tokens={tokens}): tokens lie in the prompt. For generated ones alone say "
                "tokens=Prompt(), invert=True."
            )
        return tokens
    if isinstance(tokens, str) and tokens:
        return tokens
    listed = tuple(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else (tokens,)
    if isinstance(tokens, bool | int | str) or any(not isinstance(i, int) or isinstance(i, bool) for i in listed):
        raise RecipeError(
            f"GateSpec(tokens={tokens!r}): expected None, a list of indices, a piece of text (in quotes, if YAML reads "
            "it as a value), positions, or a mapping with 'kind'."
        )
    return listed


def _located(kind: Any = None, **options: Any) -> Positions:
    if kind not in _LOCATORS:
        try:
            return Positions.from_dict({"kind": kind, **options})
        except PositionError as error:
            raise RecipeError(f"{error} Or a locator: {', '.join(_LOCATORS)}.") from error
    try:
        return _LOCATORS[kind](**options)
    except TypeError as error:
        raise RecipeError(f"Cannot read the locator {kind!r} from {options}: {error}.") from error


def _read_modules(modules: Any) -> Any:
    names = (modules,) if isinstance(modules, str) else modules
    known = (*GATE_MODULES, *BLOCK_COMPONENTS, *GLOBAL_COMPONENTS)
    wrong = names is not None and (not isinstance(names, Iterable) or [name for name in names if name not in known])
    if wrong:
        raise RecipeError(
            f"GateSpec(modules={modules!r}): unknown {wrong if isinstance(wrong, list) else modules!r}. The presets "
            f"are {', '.join(GATE_MODULES)}, the components {', '.join(known[len(GATE_MODULES) :])}."
        )
    return modules if names is None or isinstance(modules, str) else tuple(n for n in known if n in set(names))


def _spans(indices: Iterable[int]) -> Iterator[Span]:
    """Runs of neighbours, each as one span; those of negative indices end before 0, which begins at the front."""
    numbered = enumerate(sorted(set(indices)))
    for _, run in groupby(numbered, lambda pair: (pair[1] - pair[0], pair[1] < 0)):
        members = [index for _, index in run]
        yield Span(members[0], members[-1] + 1, strict=False)


def shared_with_train(tokenizer: Any, context: str) -> Positions:
    """Tokens of a prompt that also stood round every question in training, and that nobody said.

    Chosen are tokens whose id occurs in the training context and that are neither the user's words nor the answer's:
    there an equal id is a coincidence ("the" in a question and in a system text).

    Args:
        tokenizer: The model's.
        context: The training context as text, rendered round an empty question.
    """
    ids = sorted(set(tokenizer(context, add_special_tokens=False)["input_ids"]))
    return _LOCATORS["shared_with_train"](ids)


def named_gates(entity: str = "") -> dict[str, GateSpec]:
    """The gates of the localisation tables, each beside its inverse.

    Args:
        entity: Name whose first mention (all of its tokens) is gated, such as the model's own; none if empty.

    Returns:
        ``all`` and ``none``; ``entity_only`` and ``no_entity``; ``template_only`` and ``no_template`` (tokens that
        nobody wrote); ``last_only`` and ``no_last``; and, of attention and feed-forward maps in the first half of the
        layers at the entity (or anywhere), ``only_attn_early`` and ``complement_attn_early``, ``only_ffn_early`` and
        ``complement_ffn_early``.

    Example:
        >>> sorted(named_gates())[:3], named_gates("Qwen")["no_entity"].to_dict()
        (['all', 'complement_attn_early', 'complement_ffn_early'], {'tokens': 'Qwen', 'invert': True})
    """
    gates = {"all": GateSpec(), "none": GateSpec(tokens=[])}
    located = {"entity": entity, "template": {"kind": "chat_template"}, "last": {"kind": "last"}}
    for name, tokens in located.items():
        if tokens:
            gates |= {f"{name}_only": GateSpec(tokens=tokens), f"no_{name}": GateSpec(tokens=tokens, invert=True)}
    for modules in GATE_MODULES:
        only = GateSpec(tokens=entity or None, modules=modules, layers="early")
        gates |= {f"only_{modules}_early": only, f"complement_{modules}_early": replace(only, complement=True)}
    return gates
