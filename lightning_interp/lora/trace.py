"""What an adapter does at each token: how large its branch is, and along which of its singular directions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear, pad

from lightning_interp.core.hooks.intervention import Attachment, Intervention, first_input, split_output
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.components import own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.generation import repeat_rows
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.holders import held_adapters
from lightning_interp.core.weights.low_rank import LowRank, low_rank_pairs, only_adapter
from lightning_interp.errors import IncompatibleModelError, PositionError, RecipeError
from lightning_interp.lora.svd import directions_of
from lightning_interp.lora.trace_result import AdapterTrace, TracedModule

__all__ = ["AdapterTracer", "trace_adapter"]


class AdapterTracer(Intervention):
    """Keep what an adapter does at each token of the passes that a model runs, without changing them.

    Each module's input is multiplied by ``A`` and by a small matrix of the rank, in float32: no full matrix, no loop
    over rows, and the device is not waited for before :attr:`trace` is asked for. The text that the KV cache holds is
    what is kept: rows of tokens that ``generate`` adds are appended, rejected candidates are taken off again, and a new
    text begins a new trace.

    The branch is measured without dropout, in training mode too: it is what the adapter does on average there. Under a
    gate it is what the adapter would add to each module's input, whether or not the gate lets it.

    Args:
        adapter: Its name; None for the only one.
        top: How many coordinates to keep.

    Raises:
        RecipeError: If ``top`` is below 0.

    Example:
        >>> from lightning_interp.models import CausalLM, LoraSettings
        >>> model = CausalLM("tiny:llama", lora=LoraSettings(r=1, target_modules=["down_proj"])).model
        >>> tracer = AdapterTracer(top=1)
        >>> with tracer.attach(model):
        ...     _ = model.generate(torch.arange(1, 6)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        >>> tracer.trace.norms.shape, tracer.trace.modules[0].name
        (torch.Size([1, 7, 4]), 'mlp.down_proj')
    """

    def __init__(self, adapter: str | None = None, *, top: int = 3) -> None:
        if top < 0:
            raise RecipeError(f"AdapterTracer(top={top}): expected how many coordinates to keep, 0 or more.")
        self.adapter, self.top = adapter, top
        self._modules: tuple[TracedModule, ...] = ()
        self.clear()

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """None: adapted layers are read, wherever they are."""
        return ()

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity; see :meth:`install`."""
        return x

    def check(self, model_map: ModelMap) -> None:
        """Refuse an adapter that is missing, merged or disabled, or more than low-rank pairs (a bias may be there)."""
        low_rank_pairs(model_map, self.adapter, purpose="A trace", extras={"lora_bias"})

    def install(self, attachment: Attachment) -> None:
        """Hook every adapted layer and its base."""
        pairs = low_rank_pairs(attachment.model_map, self.adapter, purpose="A trace", extras={"lora_bias"})
        self._modules = tuple(TracedModule(pair.path, pair.layer, pair.name, pair.rank) for pair in pairs)
        self.clear()
        if any(pair.layer is None and not pair.is_table for pair in pairs):
            attachment.watch_head()
        for index, pair in enumerate(pairs):
            before = Hook(partial(self._before, attachment, index, _Reader(pair, self.top)))
            attachment.add(pair.module.register_forward_pre_hook(before, with_kwargs=True))
            attachment.expect(before, pair.path)
            base: Any = own_map(pair.module)
            attachment.add(base.register_forward_hook(Hook(partial(self._after, attachment, index, pair))))
        name = only_adapter(attachment.model_map, self.adapter)
        attachment.on_installed(lambda: _check_active(name, pairs))

    @property
    def modules(self) -> tuple[TracedModule, ...]:
        """The modules that are traced; none before attaching."""
        return self._modules

    def clear(self) -> None:
        """Forget everything that was read."""
        self._branches: list[_Columns] = [_Columns() for _ in self._modules]
        self._bases: list[_Columns] = [_Columns() for _ in self._modules]
        self._positions, self._ids = _Columns(), _Columns()

    @property
    def trace(self) -> AdapterTrace:
        """What was read of the last text.

        Raises:
            PositionError: If no pass has run yet.
        """
        if not self._positions.held:
            raise PositionError("AdapterTracer has seen no pass. Run the model, or generate, while it is attached.")
        positions = self._positions.joined(-1)
        padding = (positions < 0)[..., None]

        def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            stacked = torch.stack([part.to(positions.device) for part in parts], dim=2)
            return stacked.masked_fill(padding if stacked.dim() == 3 else padding[..., None], torch.nan)

        read = [columns.joined(torch.nan) for columns in self._branches]
        nothing = torch.full_like(read[0][..., 0], torch.nan)
        ones = zip(self._modules, read, strict=True)
        scalars = [each[..., -1] if module.rank == 1 else nothing.to(each.device) for module, each in ones]
        ids = self._ids.joined(-1) if self._ids.held else None
        return AdapterTrace(
            self._modules,
            together([each[..., 0] for each in read]),
            together([columns.joined(torch.nan)[..., 0] for columns in self._bases]),
            together(scalars),
            together([self._coordinates(module, each) for module, each in zip(self._modules, read, strict=True)]),
            positions,
            ids,
        )

    def _coordinates(self, module: TracedModule, read: torch.Tensor) -> torch.Tensor:
        """The first coordinates ``[B, T, top]``, NaN beyond the rank."""
        found = read[..., 1 : -1 if module.rank == 1 else None]
        return pad(found, (0, self.top - found.shape[-1]), value=torch.nan)

    def _before(
        self, attachment: Attachment, index: int, reader: _Reader, _: nn.Module, args: Any, kwargs: Any
    ) -> None:
        step = attachment.step
        if not _once(self, index, step):  # gradient checkpointing runs a block again
            return
        if _once(self, "pass", step):
            self._begin(step)
        with _outside(step.device):
            self._branches[index].add(step, _placed(reader(first_input(args, kwargs)[0]), step, reader.pair))

    def _after(self, attachment: Attachment, index: int, pair: LowRank, _: nn.Module, __: Any, output: Any) -> None:
        step = attachment.step
        if not _once(self, ("base", index), step):  # a gate runs it again for some rows
            return
        with _outside(step.device):
            norm = torch.linalg.vector_norm(split_output(output)[0], dim=-1, keepdim=True, dtype=torch.float32)
            self._bases[index].add(step, _placed(norm, step, pair))

    def _begin(self, step: StepContext) -> None:
        told = step.generation
        if told is not None and (told.beams > 1 or step.rewound):
            why = f"beams ({told.beams})" if told.beams > 1 else "candidates for new tokens, some of them rejected"
            raise PositionError(
                f"A trace cannot follow a generation of {why}: its rows are not those of one text. Generate without, "
                "or trace the finished text in one pass."
            )
        self._positions.add(step, step.positions)
        if step.input_ids is not None:
            self._ids.add(step, step.input_ids)


def trace_adapter(
    model: nn.Module | ModelMap,
    batch: Mapping[str, Any],
    *,
    adapter: str | None = None,
    top: int = 3,
    target: str | None = None,
) -> AdapterTrace:
    """Run a batch through a model once, and tell what its adapter does at each token.

    The pass is in evaluation mode and without gradients; modes and random states are put back. For passes of your own,
    ``generate`` and Lightning runs, attach an :class:`AdapterTracer`.

    Args:
        model: A model with an adapter; a PEFT wrapper or a LightningModule that holds one will do.
        batch: ``input_ids`` ``[B, T]``, ``attention_mask`` and what else the model takes; labels and entries that it
            does not know are left out.
        adapter: Its name; None for the only one.
        top: How many coordinates to keep.
        target: Dotted path of the Hugging Face model, where there are several.

    Returns:
        The trace.

    Raises:
        IncompatibleModelError: If the adapter is missing, merged, disabled or not active, or more than low-rank pairs.

    Example:
        >>> from lightning_interp.models import CausalLM, LoraSettings
        >>> model = CausalLM("tiny:llama", lora=LoraSettings(r=2, target_modules=["q_proj"])).model
        >>> trace = trace_adapter(model, {"input_ids": torch.arange(5)[None]})
        >>> trace.norms.shape, trace.table()[0]["module"], trace.table()[0]["norm"]
        (torch.Size([1, 5, 4]), 'self_attn.q_proj', 0.0)
    """
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model, target=target)
    tracer = AdapterTracer(adapter, top=top)
    takes = inspect.signature(model_map.model.forward).parameters
    given = {name: value for name, value in batch.items() if name in takes and name != "labels"}
    if "use_cache" in takes:
        given.setdefault("use_cache", False)
    with tracer.attach(model_map), undisturbed(model_map.model):
        if "logits_to_keep" in takes and all(module.layer is not None for module in tracer.modules):
            given["logits_to_keep"] = 1  # nobody reads the logits
        model_map.model(**given)
    return tracer.trace


class _Reader:
    """Reads one module's input; its maps are made anew when the adapter's weights have changed."""

    def __init__(self, pair: LowRank, top: int) -> None:
        self.pair, self.top = pair, top
        self._made: tuple[Any, ...] = ()
        self._seen: list[tuple[int, int]] = []
        self._maps()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Norm of the branch, its first coordinates, and of rank 1 the scalar ``[..., n]``."""
        pair = self.pair
        down, onto, offset = self._maps()
        low = embedding(x, down.T) if pair.is_table else linear(x.float(), down)
        along = linear(low, onto, offset)
        if pair.is_table and (factor := getattr(own_map(pair.module), "embed_scale", None)) is not None:
            along = along * factor
        norm = torch.linalg.vector_norm(along, dim=-1, keepdim=True)
        count = min(self.top, len(onto) - (offset is not None))
        return torch.cat([norm, along[..., :count], *([low] if pair.rank == 1 else [])], dim=-1)

    def _maps(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``A``, and the branch as coordinates along orthonormal directions: ``scale U^T B``, and that of the bias."""
        pair = self.pair
        tensors = [tensor for tensor in (pair.down, pair.up, pair.bias) if tensor is not None]
        seen = [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if seen != self._seen:
            outputs = directions_of(pair).outputs
            onto, offset = pair.scale * outputs.T @ pair.up.detach().to(outputs), None
            if pair.bias is not None:  # what no direction holds of it is one coordinate more
                bias = pair.scale * pair.bias.detach().to(outputs)
                inside = outputs.T @ bias
                offset = torch.cat([inside, torch.linalg.vector_norm(bias - outputs @ inside)[None]]).float()
                onto = torch.cat([onto, torch.zeros_like(onto[:1])])
            self._made, self._seen = (pair.down.detach().float(), onto.float(), offset), seen
        return self._made


class _Columns:
    """Columns of the text that the KV cache holds, pass by pass."""

    def __init__(self) -> None:
        self.held: list[tuple[int, torch.Tensor]] = []

    def add(self, step: StepContext, values: torch.Tensor) -> None:
        """The columns ``[B, T, ...]`` of a pass; what was held behind its first one is off the cache."""
        before = [(start, each[:, : step.past - start]) for start, each in self.held if start < step.past]
        self.held = [*before, (step.past, values)]

    def joined(self, fill: float) -> torch.Tensor:
        """All columns from the first one on; those of passes that were not seen are filled."""
        rows, parts, end = len(self.held[-1][1]), list[torch.Tensor](), 0
        for start, each in self.held:
            wide = repeat_rows(each, rows)
            if start > end:
                parts.append(wide.new_full((rows, start - end, *wide.shape[2:]), fill))
            parts.append(wide)
            end = start + wide.shape[1]
        return torch.cat(parts, dim=1)


def _placed(values: torch.Tensor, step: StepContext, pair: LowRank) -> torch.Tensor:
    """What was read of a module as ``[B, T, n]``, NaN where the head was not asked."""
    rows, columns, n = step.batch_size, step.length, values.shape[-1]
    if values.shape == (rows, columns, n):
        return values
    kept = values.shape[1] if values.dim() == 3 and pair.layer is None and isinstance(step.kept, int) else columns
    if values.shape == (1, columns, n):  # positions that all rows share
        return values.expand(rows, -1, -1)
    if values.numel() != rows * kept * n:
        raise PositionError(
            f"{pair.path} is called with {values.shape[:-1].numel()} rows, but the pass has {rows} x {columns} tokens, "
            "so that whose they are is not known. Attach a tracer after gates and grafts; an adapter on single experts "
            "of a mixture cannot be traced."
        )
    return pad(values.reshape(rows, kept, n), (0, 0, columns - kept, 0), value=torch.nan)


def _once(owner: object, what: Any, step: StepContext) -> bool:
    """Whether this is the first time of something in a pass."""
    first = (owner, what) not in step.cache
    step.cache[owner, what] = True
    return first


@contextmanager
def _outside(device: torch.device) -> Iterator[None]:
    """Work beside a pass: in full precision, without gradients, and with tensors that can be used in autograd later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _check_active(name: str, pairs: Sequence[LowRank]) -> None:
    for pair in pairs:
        active = list(pair.module.active_adapters)
        if name not in active and name not in held_adapters(pair.module):
            raise IncompatibleModelError(
                f"Adapter {name!r} is not active in {pair.path} ({active} are), so there is nothing to trace. Make it "
                "the active one (set_adapter)."
            )
