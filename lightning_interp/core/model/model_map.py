"""Find the decoder inside any module by its structure, and say what each place in it means."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_interp.core.model.components import (
    BLOCK_COMPONENTS,
    GLOBAL_COMPONENTS,
    Components,
    Part,
    attention_of,
    block_components,
    has_post_norms,
    maps_of,
    mlp_of,
    residual_doubt,
)
from lightning_interp.core.model.sites import LAYER_KINDS, Site
from lightning_interp.errors import SiteError

__all__ = ["ModelMap", "SitePoint", "find_decoder"]

_EMBED_NORMS = ("word_embeddings_layernorm", "embed_layer_norm")
_POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings")
_FINAL_NORMS = ("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "layer_norm")


@dataclass(frozen=True)
class SitePoint:
    """How a site is reached: the module to hook, and whether its input or its output is meant."""

    module: nn.Module
    path: str
    is_input: bool


@dataclass(eq=False)
class ModelMap:
    """A decoder seen through one vocabulary: blocks, sites and canonical components.

    Build one with :meth:`build`. The map holds references only and changes nothing.

    Args:
        model: The Hugging Face model (the one whose ``forward`` users call).
        path: Dotted path of ``model`` below the module that was given to :meth:`build`.
        backbone: The module that holds the block stack; its inputs tell positions.
        blocks: The block stack.
        components: One table of canonical components a layer.
        shared: Components of which there is one (``embed``, ``pos_embed``, ``final_norm``, ``unembed``).
        memo: What was worked out from the modules; build a new map after changing them.
        outer: Hugging Face models and PEFT wrappers on the way to ``model``, which comes last.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> model_map = ModelMap.build(tiny_model("gpt2"))
        >>> len(model_map), sorted(model_map.linears(0))
        (4, ['down', 'k', 'o', 'q', 'up', 'v'])
    """

    model: nn.Module
    path: str
    backbone: nn.Module
    blocks: nn.ModuleList
    components: list[Components]
    shared: Components
    _attn: list[str | None] = field(repr=False)
    _mlp: list[str | None] = field(repr=False)
    _paths: dict[nn.Module, str] = field(repr=False)
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    outer: tuple[nn.Module, ...] = field(default=(), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A copy works its memo out anew: what is remembered names modules and donors of this process.
        return {**self.__dict__, "memo": {}}

    @classmethod
    def build(
        cls,
        model: nn.Module,
        *,
        target: str | None = None,
        blocks: str | None = None,
        attn: str | None = None,
        mlp: str | None = None,
        head: str | None = None,
    ) -> ModelMap:
        """Find the decoder below ``model`` (a plain model, a PEFT wrapper, a LightningModule).

        Args:
            model: Any module that contains exactly one Hugging Face decoder.
            target: Dotted path of the Hugging Face model, where there are several.
            blocks: Dotted path of the block stack below it, where the structure does not tell.
            attn: Name of the attention child in each block.
            mlp: Name of the feed-forward child in each block.
            head: Dotted path of the unembedding.

        Returns:
            The map.

        Raises:
            SiteError: If there is no decoder, more than one, or a named module does not exist.
        """
        path, decoder = find_decoder(model, target)
        paths = {module: name for name, module in decoder.named_modules()}
        stack_path, stack = _block_stack(decoder, blocks, paths)
        backbone = decoder.get_submodule(stack_path.rpartition(".")[0])
        names_attn = [_child_name(block, attn, attention_of(block), "attn") for block in stack]
        names_mlp = [_child_name(block, mlp, mlp_of(block), "mlp") for block in stack]
        config: Any = decoder.config
        tables = [
            block_components(block, f"{stack_path}.{i}", config, a, m)
            for i, (block, a, m) in enumerate(zip(stack, names_attn, names_mlp, strict=True))
        ]
        shared = _shared_components(decoder, backbone, paths, head)
        outer = _models_on_the_way(model, path)
        return cls(decoder, path, backbone, stack, tables, shared, names_attn, names_mlp, paths, outer=outer)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def head(self) -> nn.Module | None:
        """The unembedding, or None for a model without one."""
        return self.shared["unembed"][0].module if "unembed" in self.shared else None

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding, or None."""
        return self.shared["final_norm"][0].module if "final_norm" in self.shared else None

    @property
    def backbone_path(self) -> str:
        """Dotted path of the backbone below :attr:`model`."""
        return self._paths[self.backbone]

    def layer(self, index: int) -> int:
        """Check a block index and make it non-negative.

        Raises:
            SiteError: If the model has no such layer.
        """
        if not -len(self) <= index < len(self):
            raise SiteError(f"{self._name} has layers 0 to {len(self) - 1}, but got layer {index}.")
        return index % len(self)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Canonical linear maps of one layer, by name (fused maps appear under each of their names)."""
        table = self.components[self.layer(layer)]
        return {name: maps_of(parts)[0].module for name, parts in table.items() if not name.startswith("ln_")}

    def parts(self, component: str, layer: int | None = None) -> tuple[Part, ...]:
        """Modules of one canonical component.

        Args:
            component: A name of ``BLOCK_COMPONENTS`` or ``GLOBAL_COMPONENTS``.
            layer: Block index; None for the components of which there is one.

        Returns:
            Its parts, at least one.

        Raises:
            SiteError: If this model has no such component (the message lists what it has).
        """
        table = self.shared if layer is None else self.components[self.layer(layer)]
        if component in table:
            return table[component]
        where = self._name if layer is None else f"{self._name}, layer {self.layer(layer)}"
        if component not in (*BLOCK_COMPONENTS, *GLOBAL_COMPONENTS):
            raise SiteError(f"No family has a component {component!r}. {where} has: {', '.join(table) or 'none'}.")
        if layer is None and component in BLOCK_COMPONENTS:
            raise SiteError(f"Component {component!r} is in every block of {where}. Name the layer, counted from 0.")
        raise SiteError(f"{where} has no component {component!r}. It has: {', '.join(table) or 'none'}.")

    def cells(self) -> Iterator[tuple[str, int | None, Part]]:
        """Every (component, layer, part) of the model."""
        for name, parts in self.shared.items():
            yield from ((name, None, part) for part in parts)
        for layer, table in enumerate(self.components):
            for name, parts in table.items():
                yield from ((name, layer, part) for part in parts)

    def unmapped(self, *, inside: bool = False) -> list[str]:
        """Parameters that belong to no canonical component, by name; only those ``inside`` of blocks if asked."""
        if "unmapped" not in self.memo:
            covered = {id(p) for _, _, part in self.cells() for p in part.module.parameters()}
            self.memo["unmapped"] = sorted(n for n, p in self.model.named_parameters() if id(p) not in covered)
        found: list[str] = self.memo["unmapped"]
        stack = self._paths[self.blocks[0]].rpartition(".")[0]
        return [name for name in found if name.startswith(f"{stack}.")] if inside else found

    def module(self, site: Site) -> SitePoint:
        """Where to hook for a site.

        Args:
            site: The site.

        Returns:
            The module, its path, and whether the site is its input.

        Raises:
            SiteError: If this family lacks the site, or it means something else there.
        """
        if site.component is not None:
            parts = self.parts(site.component, site.layer)
            part = (parts if site.layer is None else maps_of(parts))[-1]
            if part.columns is not None:
                raise SiteError(
                    f"{self._name} fuses {site.component!r} into {part.path}, so {site} is not the output of one "
                    "module. Hook 'attn_in' or 'attn_out' instead."
                )
            return SitePoint(part.module, part.path, False)
        if site.kind in LAYER_KINDS:
            return self._layer_point(site)
        module = self.final_norm if site.kind == "final_norm" else self.head
        if module is None:
            raise SiteError(f"{self._name} has no {site.kind!r}. It has: {', '.join(self.describe()['sites'])}.")
        return SitePoint(module, self._paths[module], site.kind == "unembed_in")

    def _layer_point(self, site: Site) -> SitePoint:
        layer = self.layer(site.layer or 0)  # a Site of this kind has a layer
        block = self.blocks[layer]
        if site.kind.startswith("resid"):
            return SitePoint(block, self._paths[block], site.kind == "resid_pre")
        part, _, end = site.kind.partition("_")
        name = (self._attn if part == "attn" else self._mlp)[layer]
        if name is None:
            children = ", ".join(n for n, _ in block.named_children())
            raise SiteError(
                f"{type(block).__name__} ({self._paths[block]}) has no {part!r} module; its children are {children}. "
                f"Use site {site.kind!r} only on models with one, or pass ModelMap.build(model, {part}=...)."
            )
        module = block.get_submodule(name)
        if end == "out":
            module = self._residual_write(layer, part, module, site)
        return SitePoint(module, self._paths[module], end == "in")

    def _residual_write(self, layer: int, part: str, module: nn.Module, site: Site) -> nn.Module:
        """The module whose output is added to the residual stream as it is."""
        block = self.blocks[layer]
        if "residual" in inspect.signature(module.forward).parameters:
            instead = "linear:o" if part == "attn" else "linear:down"
            raise SiteError(
                f"{type(module).__name__} ({self._paths[module]}) adds the residual inside, so {site} would mean "
                f"something else there. Use Site({instead!r}, {site.layer}), the write before the addition."
            )
        doubt = residual_doubt(block, self.components[layer], (self._attn[layer], self._mlp[layer]))
        if doubt is not None:
            raise SiteError(
                f"{type(block).__name__} ({self._paths[block]}) {doubt}, so {site} may not be what is added to the "
                "residual stream. Use 'resid_pre' and 'resid_post'."
            )
        names = {"attn": ["post_self_attn_layernorm"], "mlp": ["post_mlp_layernorm", "post_feedforward_layernorm"]}
        if has_post_norms(block):
            names["attn"].append("post_attention_layernorm")
        children = dict(block.named_children())
        return next((children[name] for name in names[part] if name in children), module)

    def describe(self) -> dict[str, Any]:
        """What this map found, in plain values: class, blocks, sites and components."""
        sites = []
        for kind in LAYER_KINDS:
            try:
                self.module(Site(kind, 0))
            except SiteError:
                continue
            sites.append(kind)
        modules = {"final_norm": self.final_norm, "unembed_in": self.head, "logits": self.head}
        sites += [kind for kind, found in modules.items() if found is not None]
        return {
            "model": type(self.model).__name__,
            "path": self.path,
            "layers": len(self),
            "block": type(self.blocks[0]).__name__,
            "sites": sites,
            "components": list(self.shared) + list(self.components[0]),
            "unmapped": self.unmapped(),
        }

    def config_value(self, name: str, default: Any = None) -> Any:
        """One value of the model's configuration."""
        return getattr(self.model.config, name, default)

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def find_decoder(module: nn.Module, target: str | None = None) -> tuple[str, nn.Module]:
    """Dotted path and module of the outermost Hugging Face model below a module, or of the one at ``target``."""
    from transformers import PreTrainedModel

    if target is not None:
        try:
            chosen = module.get_submodule(target)
        except AttributeError as error:
            raise SiteError(f"{type(module).__name__} has no submodule {target!r}: {error}.") from error
        path, decoder = ("", chosen) if isinstance(chosen, PreTrainedModel) else find_decoder(chosen)
        return f"{target}.{path}".rstrip("."), decoder

    def outermost(outer: nn.Module, at: str) -> Iterator[tuple[nn.Module, str]]:
        if isinstance(outer, PreTrainedModel):
            yield outer, at
        for name, child in () if isinstance(outer, PreTrainedModel) else outer.named_children():
            yield from outermost(child, f"{at}.{name}".lstrip("."))

    names: dict[nn.Module, str] = {}
    for model, name in outermost(module, ""):
        names.setdefault(model, name)
    found = [(name, model) for model, name in names.items()]
    if not found:
        raise SiteError(
            f"{type(module).__name__} holds no Hugging Face model. Expected a transformers PreTrainedModel in it; "
            "models built in configure_model exist only once the Trainer has started."
        )
    if len(found) > 1:
        several = ", ".join(f"{name!r} ({type(child).__name__})" for name, child in found)
        raise SiteError(
            f"{type(module).__name__} holds {len(found)} Hugging Face models: {several}. Choose one with target=."
        )
    return found[0]


def _models_on_the_way(module: nn.Module, path: str) -> tuple[nn.Module, ...]:
    from transformers import PreTrainedModel

    names = path.split(".") if path else []
    way = (module.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1))
    return tuple(m for m in way if isinstance(m, PreTrainedModel) or hasattr(type(m), "active_peft_config"))


def _block_stack(decoder: nn.Module, path: str | None, paths: Mapping[nn.Module, str]) -> tuple[str, nn.ModuleList]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    if path is not None:
        try:
            stack = decoder.get_submodule(path)
        except AttributeError as error:
            raise SiteError(f"{type(decoder).__name__} has no block stack {path!r}: {error}.") from error
        if not isinstance(stack, nn.ModuleList):
            raise SiteError(
                f"{path!r} of {type(decoder).__name__} is a {type(stack).__name__}, expected a ModuleList of blocks."
            )
        return path, stack
    found = [
        (name, child)
        for child, name in paths.items()
        if isinstance(child, nn.ModuleList)
        and len(child) > 0
        and all(isinstance(block, GradientCheckpointingLayer) for block in child)
    ]
    if len(found) != 1:
        names = ", ".join(repr(name) for name, _ in found) or "none"
        raise SiteError(
            f"{type(decoder).__name__} has {len(found)} block stacks ({names}), expected one. "
            "Name it with ModelMap.build(model, blocks='path.to.layers')."
        )
    return found[0]


def _child_name(block: nn.Module, given: str | None, guess: str | None, role: str) -> str | None:
    if given is not None and not hasattr(block, given):
        children = ", ".join(name for name, _ in block.named_children())
        raise SiteError(f"{type(block).__name__} has no child {given!r} for {role}=; its children are {children}.")
    return given or guess


def _shared_components(decoder: Any, backbone: nn.Module, paths: dict[nn.Module, str], head: str | None) -> Components:
    found: dict[str, list[nn.Module]] = {}
    embedding = decoder.get_input_embeddings()
    if embedding is not None:
        norms = [getattr(backbone, name) for name in _EMBED_NORMS if hasattr(backbone, name)]
        found["embed"] = [embedding, *norms]
    children = dict(backbone.named_children())
    found["pos_embed"] = [children[name] for name in _POSITION_EMBEDDINGS if name in children]
    found["final_norm"] = [children[name] for name in _FINAL_NORMS if name in children][:1]
    output = decoder.get_output_embeddings()
    if head is not None:
        try:
            output = decoder.get_submodule(head)
        except AttributeError as error:
            raise SiteError(f"{type(decoder).__name__} has no head {head!r}: {error}.") from error
    found["unembed"] = [output] if output is not None else []
    return {
        name: tuple(Part(paths[module], module, per_call=name == "pos_embed") for module in modules)
        for name, modules in found.items()
        if modules
    }
