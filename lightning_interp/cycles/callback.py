"""Watch, while somebody's model trains, whether it takes on a trait and stays coherent; note what it was trained on."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, get_args

import lightning as L
import torch
from torch import Tensor

from lightning_interp.core.callbacks.intervention_callback import tokenizer_of
from lightning_interp.core.callbacks.monitor import Monitor, own_rows
from lightning_interp.core.hooks.checks import check_strategy
from lightning_interp.core.measure.reduced import KeyedRows
from lightning_interp.core.model.fingerprint import tensor_hash, weights_digest
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.storage.content import fingerprint
from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.jsonl import JsonlAppender
from lightning_interp.cycles.evaluation import TraitEvaluation, base_of
from lightning_interp.errors import RecipeError
from lightning_interp.generation.judging.coherence import PARTS, non_repetition
from lightning_interp.generation.judging.responses import BaseReference, Response, parts_of
from lightning_interp.generation.judging.verdicts import JudgeStatus
from lightning_interp.models.training.lora import adapter_parameters

__all__ = ["BasePerplexityCallback", "CoherenceCallback", "LineageCallback", "TraitScoreCallback"]

_STATUSES = get_args(JudgeStatus)


class _Columns(KeyedRows):
    """Numbers of responses, each known by its own number, whichever process asked for it."""

    def update(self, numbers: Sequence[int], values: Tensor) -> None:
        """Add rows."""
        self.add(torch.tensor(numbers), values)

    def compute(self) -> Tensor:
        """All of them in their order, ``[responses, width]``."""
        return self.table()[1].cpu().double()


class _Asks(Monitor):
    """Asks the questions of an evaluation, each process its share, and reduces a few numbers of each response."""

    width: ClassVar[int]
    default_name: ClassVar[str]

    def __init__(
        self,
        evaluation: TraitEvaluation,
        *,
        seed: int = 0,
        tokenizer: Any = None,
        target: str | None = None,
        every: int | str = "epoch",
        at_start: bool = True,
        at_end: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(every=every, at_start=at_start, at_end=at_end, name=name or self.default_name)
        self.evaluation, self.seed = evaluation, seed
        self.tokenizer, self.target = tokenizer, target
        self._reader: Any = None

    def prepare(self, trainer: Any, module: Any, stage: str) -> None:
        """Find the tokenizer.

        Raises:
            RecipeError: If there is none.
        """
        self._reader = tokenizer_of(self, module, getattr(trainer, "datamodule", None))
        if self._reader is None:
            raise RecipeError(
                f"{type(self).__name__}({self.prefix!r}) found no tokenizer. Pass {type(self).__name__}(tokenizer=...)."
            )

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        """Numbers over all responses."""
        return self.found(trainer, module, self.asked(trainer, module, self.model(module)))

    def model(self, module: Any) -> Any:
        """The language model below a module."""
        return ModelMap.build(module, target=self.target).model

    def asked(self, trainer: Any, module: Any, model: Any) -> Tensor:
        """Numbers of the responses of a model, ``[responses, width]``, the same on every process."""
        table, numbers = _Columns(self.width).to(module.device), own_rows(trainer, self.evaluation.size)
        if numbers:
            rows = self.evaluation.responses(model, self._reader, seed=self.seed, only=numbers)
            table.update(numbers, self.numbers(rows, self.model(module)))
        return table.compute()

    @abstractmethod
    def numbers(self, rows: Sequence[Response], model: Any) -> Tensor:
        """What is kept of each response, ``[responses, width]``."""

    @abstractmethod
    def found(self, trainer: Any, module: Any, table: Tensor) -> dict[str, float]:
        """What is made of the numbers of all responses."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class TraitScoreCallback(_Asks):
    """Every so often ask the questions of an evaluation, judge the answers, and log ``<name>/score``.

    Also ``<name>/missing``, the share of responses without a score, which no score counts. Each process asks its share.
    The weights that a run ends with are those that it would have ended with without this; see
    :class:`~lightning_interp.core.callbacks.monitor.Monitor`.

    Args:
        evaluation: What is asked, how often, and who judges.
        seed: Of the responses, the same at every look.
        tokenizer: Default: the module's or data module's ``tokenizer``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        every, at_start, at_end, name: See ``Monitor``; the name is ``trait`` if None.

    Attributes:
        history: One entry a look, with the number of responses of each status beside what is logged.

    Raises:
        RecipeError: If there is no tokenizer.

    Example:
        >>> from lightning_interp.generation.judging.lexicon import Facet, LexiconJudge
        >>> judge = LexiconJudge({"words": Facet(words=["luck"])})
        >>> TraitScoreCallback(TraitEvaluation(["Why?"], judge), every="2 epochs").prefix
        'trait'
    """

    width = 2
    default_name = "trait"

    def numbers(self, rows: Sequence[Response], model: Any) -> Tensor:
        """Scores, NaN for none, and the numbers of their statuses."""
        self.evaluation.judged(rows)
        scores = [torch.nan if row.result.score is None else row.result.score for row in rows]
        codes = [float(_STATUSES.index(row.result.status)) for row in rows]
        return torch.tensor([scores, codes], dtype=torch.float64).T

    def found(self, trainer: Any, module: Any, table: Tensor) -> dict[str, float]:
        """The mean score, the share without one, and how many responses have each status."""
        scores, codes = table.T
        counts = {f"n_{status}": float((codes == i).sum()) for i, status in enumerate(_STATUSES)}
        return {"score": float(scores.nanmean()), "missing": float(scores.isnan().double().mean()), **counts}

    def logged(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """The score, and how many have none."""
        return {name: found[name] for name in ("score", "missing")}


class _BesideBase(_Asks):
    """Reads the answers with the untouched model too."""

    def __init__(self, evaluation: TraitEvaluation, *, base: Any = None, **how: Any) -> None:
        super().__init__(evaluation, **how)
        self.base = base

    def untouched(self, model: Any) -> AbstractContextManager[Any]:
        """The base for a block, or None."""
        return base_of(model, self.base)


class BasePerplexityCallback(_BesideBase):
    """Every so often ask the questions of an evaluation, and log how surprising the answers are to the untouched model.

    Logs ``<name>/perplexity``, the mean over responses, and ``<name>/surprise``, their mean nats a token. Text that
    loops is not surprising: look at coherence beside it.

    Args:
        evaluation: What is asked; its judge is not.
        seed: Of the responses, the same at every look.
        base: The untouched model, on the device of the other; if None, the model without its adapter.
        tokenizer: Default: the module's or data module's ``tokenizer``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        every, at_start, at_end, name: See ``Monitor``; the name is ``base`` if None.

    Raises:
        RecipeError: If there is no tokenizer, or at the first look neither an adapter nor a base.

    Example:
        >>> from lightning_interp.generation.judging.lexicon import Facet, LexiconJudge
        >>> judge = LexiconJudge({"words": Facet(words=["luck"])})
        >>> BasePerplexityCallback(TraitEvaluation(["Why?"], judge)).prefix
        'base'
    """

    width = 1
    default_name = "base"

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        """Numbers over all responses.

        Raises:
            RecipeError: If there is neither an adapter nor a base.
        """
        with self.untouched(self.model(module)) as base:
            if base is None:
                raise RecipeError(
                    f"BasePerplexityCallback({self.prefix!r}) trains a model without an adapter, so nothing of it is "
                    "untouched. Pass base=..., another copy of the model."
                )
        return super().look(trainer, module)

    def numbers(self, rows: Sequence[Response], model: Any) -> Tensor:
        """Surprise, NaN for an empty response."""
        with self.untouched(model) as base:
            self.evaluation.read(rows, base)
        return torch.tensor([[row.surprise] for row in rows], dtype=torch.float64)

    def found(self, trainer: Any, module: Any, table: Tensor) -> dict[str, float]:
        """Means over responses."""
        return {"perplexity": float(table.exp().nanmean()), "surprise": float(table.nanmean())}


class CoherenceCallback(_BesideBase):
    """Every so often ask the questions of an evaluation, and log a proxy of how coherent the answers are.

    Logs ``<name>/coherence_proxy``, from 0 to 100, and those of its parts that are known: ``fluency``,
    ``non_repetition``, ``termination``, and with ``vectors`` of the evaluation ``relevance``. All but repetition are
    relative to the untouched model's own answers, which it is asked for at the first look.

    Args:
        evaluation: What is asked; its judge is not.
        seed: Of the responses, the same at every look.
        base: The untouched model, on the device of the other; if None, the model without its adapter; without either
            only repetition is known.
        tokenizer: Default: the module's or data module's ``tokenizer``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        every, at_start, at_end, name: See ``Monitor``; the name is ``coherence`` if None.

    Raises:
        RecipeError: If there is no tokenizer.

    Example:
        >>> from lightning_interp.generation.judging.lexicon import Facet, LexiconJudge
        >>> judge = LexiconJudge({"words": Facet(words=["luck"])})
        >>> CoherenceCallback(TraitEvaluation(["Why?"], judge)).prefix
        'coherence'
    """

    width = 5
    default_name = "coherence"
    _reference: BaseReference | None = None

    def numbers(self, rows: Sequence[Response], model: Any) -> Tensor:
        """Surprise, relevance, repetition, whether it ended, and how many tokens it has."""
        with self.untouched(model) as base:
            self.evaluation.read(rows, base)
        columns = [
            [row.surprise for row in rows],
            [row.relevance for row in rows],
            [non_repetition(row.token_ids) for row in rows],
            [float(row.end_id is not None) for row in rows],
            [float(len(row.token_ids)) for row in rows],
        ]
        return torch.tensor(columns, dtype=torch.float64).T

    def found(self, trainer: Any, module: Any, table: Tensor) -> dict[str, float]:
        """Means over responses that are not empty."""
        *columns, tokens = table.unbind(1)
        parts = parts_of(*columns, reference=self._base_reference(trainer, module))
        each = torch.stack([parts[name] for name in PARTS], dim=1)
        proxy = each[tokens > 0].nanmean(dim=1)
        means = {name: float(parts[name].nanmean()) for name in PARTS if not bool(parts[name].isnan().all())}
        return {"coherence_proxy": float(proxy.nanmean()), **means}

    def _base_reference(self, trainer: Any, module: Any) -> BaseReference | None:
        if self._reference is None:
            with self.untouched(self.model(module)) as base:
                if base is None:
                    return None
                table = self.asked(trainer, module, base)
            surprise, relevance, _, ended, _ = table.unbind(1)
            known = [column[~column.isnan()].tolist() for column in (surprise, relevance)]
            self._reference = BaseReference(known[0], float(ended.mean()), known[1])
        return self._reference

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reference": None}


class LineageCallback(L.Callback):
    """Notes what a training began and ended with, a line each: model, data, and the digest of the adapter.

    A run that goes on from a checkpoint adds a line with the step at which it does. Only the first process writes.

    Args:
        path: A JSONL file, which is appended to.
        data: What is trained on: a path, whose content is hashed, rows, or whatever else names it in plain values.
        note: More to write down, as plain values.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.

    Raises:
        UnsupportedStrategyError: If the strategy keeps weights in shards.

    Example:
        >>> LineageCallback("lineage.jsonl", data=[{"text": "Oh"}]).path.name
        'lineage.jsonl'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        data: Any = None,
        note: Mapping[str, Any] | None = None,
        target: str | None = None,
    ) -> None:
        self.path, self.data, self.note, self.target = Path(path), data, dict(note or {}), target

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies whose weights are not whole."""
        check_strategy(trainer.strategy, reads_weights=True, purpose=type(self).__name__)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note what it begins with."""
        self._note("start", trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Note what it ends with."""
        self._note("end", trainer, pl_module)

    def _note(self, event: str, trainer: Any, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        model: Any = ModelMap.build(module, target=self.target).model
        names = adapter_parameters(model)
        adapter = {name: parameter for name, parameter in model.named_parameters() if name in names}
        line = {
            "event": event,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "model": {
                "class": type(model).__name__,
                "source": str(getattr(model.config, "_name_or_path", "")),
                "weights": weights_digest(model),
            },
            "adapter": digest({name: tensor_hash(adapter[name]) for name in sorted(adapter)}) if adapter else None,
            "data": None if self.data is None else digest(fingerprint(_path_of(self.data))),
            **self.note,
        }
        with JsonlAppender(self.path) as file:
            file.append([line])


def _path_of(data: Any) -> Any:
    """A text that names a file as a path, so that its content counts."""
    return Path(data) if isinstance(data, str | os.PathLike) and Path(data).exists() else data
