"""A causal language model on this machine as a writer: batched, with random numbers that belong to the request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.fingerprint import weights_digest
from lightning_interp.core.storage.files import digest
from lightning_interp.core.tokens.batches import padded
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.requests import Completion, TextRequest, check_sampling
from lightning_interp.generation.sampling import Ways, check_drawable, drawn_tokens, uniform_numbers

__all__ = ["LocalSampler", "Processors", "end_tokens", "request_ids"]

Processors = Sequence[LogitsProcessor] | Callable[[TextRequest], Sequence[LogitsProcessor]]
"""What forbids or favours tokens: the same for every request, or made for each; they never see padding."""

_CONTEXT = 8  # tokens of a raw prompt that are decoded with what follows
_VERSION = 1  # raised when the same request and weights give another text


@dataclass(frozen=True)
class _Row:
    """A request on its way through the model."""

    request: TextRequest
    ids: list[int]
    limit: int


class LocalSampler:
    """Writes with a causal language model.

    Requests go through the model in batches of like length, padded on the left. Each has uniform numbers of its own,
    one a token, so a text does not depend on its batch, up to the model's own rounding. Whatever is attached to the
    model acts; its mode and the random state are left as found, and what its own settings say of sampling is not used.

    Args:
        model: Anything with the ``generate`` of transformers.
        tokenizer: Its tokenizer.
        name: What decides beside weights and chat template, such as an attached intervention; part of the identity.
        batch_size: Requests at once.
        token_budget: Most tokens of one batch, read and written, padding included; no limit if None.
        logits_processors: What forbids or favours tokens; needs a ``name``.
        beams: More than 1 searches so many beams, for requests at temperature 0 without stop texts.

    Raises:
        RecipeError: If an argument has a wrong value.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> sampler = LocalSampler(tiny_model("llama"), byte_tokenizer())
        >>> sampler.generate([TextRequest(prompt="Oh", max_new_tokens=4)])[0].tokens_out
        4
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        batch_size: int = 8,
        token_budget: int | None = None,
        logits_processors: Processors | None = None,
        beams: int = 1,
    ) -> None:
        check_sampling(batch_size=batch_size, token_budget=token_budget, beams=beams)
        if logits_processors is not None and name is None:
            raise RecipeError(
                "LocalSampler(logits_processors=...) needs a name: it says what they do, and is part of the key."
            )
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self.token_budget, self.beams, self._processors = token_budget, beams, logits_processors

    def identity(self) -> dict[str, Any]:
        """The weights as they are now, the chat template, the name, and the version of the sampler."""
        decide = {"weights": weights_digest(self.model), "template": digest(str(self.tokenizer.chat_template))}
        return {"kind": "local", "version": _VERSION, "name": self.name, **decide, "beams": self.beams}

    def generate(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """Write one text a request.

        Args:
            requests: What is asked for.

        Returns:
            Completions in their order; ``"failed"`` for a request that is too long for the model.

        Raises:
            DataError: If a conversation meets no chat template or one that refuses it, or has no tokens.
        """
        rows = [self._row(request) for request in requests]
        found = [self._too_long(row) for row in rows]
        with undisturbed(self.model):
            for batch in self._batches(rows, [i for i, failed in enumerate(found) if failed is None]):
                for i, written in zip(batch, self._write([rows[i] for i in batch]), strict=True):
                    found[i] = written
        return [one for one in found if one is not None]

    def write(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """Write as one batch in the order given: for interventions that treat rows by their number.

        Args:
            requests: What is asked for.

        Returns:
            Completions in their order.

        Raises:
            DataError: As :meth:`generate`, and for a request that is too long for the model.
        """
        rows = [self._row(request) for request in requests]
        for failed in filter(None, map(self._too_long, rows)):
            raise DataError(f"A batch cannot be written: {failed.error}. Shorten that prompt.")
        with undisturbed(self.model):
            return self._write(rows)

    def next_token_probs(self, requests: Sequence[TextRequest], texts: Sequence[str]) -> Tensor:
        """Probability that an answer begins with each of some texts, such as digits.

        Args:
            requests: What is asked; their sampling settings are not used.
            texts: Candidates of one token each.

        Returns:
            Float64 ``[requests, texts]`` on the CPU.

        Raises:
            DataError: If a candidate is not one token.
        """
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        for text, found in zip(texts, ids, strict=True):
            if len(found) != 1:
                raise DataError(f"{text!r} is {len(found)} tokens of this tokenizer; expected one, to read its chance.")
        rows = [self._row(request) for request in requests]
        probs = torch.zeros(len(rows), len(texts), dtype=torch.float64)
        device = next(self.model.parameters()).device
        with undisturbed(self.model):
            for batch in self._batches(rows, range(len(rows))):
                read, mask = (x.to(device) for x in padded([rows[i].ids for i in batch], self._pad()))
                logits = self.model(input_ids=read, attention_mask=mask).logits[range(len(batch)), mask.sum(1) - 1]
                probs[batch] = logits.double().softmax(-1)[:, [one for (one,) in ids]].cpu()
        return probs

    def _row(self, request: TextRequest) -> _Row:
        ids, places = request_ids(self.tokenizer, request), _places(self.model)
        limit = request.max_new_tokens
        if limit is None and places is None:
            raise DataError("The model does not say how many tokens it takes. Give the request max_new_tokens.")
        if request.messages and not self._ends():
            raise DataError("The model has no end token, so its answers never end. Set tokenizer.eos_token.")
        room = [one for one in (limit, places and places - len(ids)) if one is not None]
        return _Row(request, ids, min(room))

    def _too_long(self, row: _Row) -> Completion | None:
        if row.limit > 0:
            return None
        why = f"the message has {len(row.ids)} tokens and the model takes {_places(self.model)}"
        return Completion(text=None, status="failed", error=why, tokens_in=0, tokens_out=0, request=row.request.digest)

    def _batches(self, rows: Sequence[_Row], numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of rows that go together: of like length, and no more than the budget."""
        batches: list[list[int]] = []
        for i in sorted(numbers, key=lambda i: (len(rows[i].ids), rows[i].limit)):
            batch = [*batches[-1], i] if batches else [i]
            size = len(batch) * (len(rows[i].ids) + max(rows[j].limit for j in batch))
            if not batches or len(batch) > self.batch_size or (self.token_budget or size) < size:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _write(self, rows: Sequence[_Row]) -> list[Completion]:
        ids, mask = padded([row.ids for row in rows], self._pad(), side="left")
        device, width, ends = next(self.model.parameters()).device, ids.shape[1], self._ends()
        stopping = _RowEnds(rows, self.tokenizer, width, device)
        draws = self._chosen(rows, width)
        # A plain configuration: what a model's own says of sampling is not part of the key.
        config = GenerationConfig(
            do_sample=False, num_beams=self.beams, max_new_tokens=max(row.limit for row in rows),
            repetition_penalty=1.0, no_repeat_ngram_size=0, temperature=1.0, top_p=1.0, top_k=50,
            eos_token_id=sorted(ends) or None, pad_token_id=self._pad(),
        )  # fmt: skip
        with undisturbed():  # the modes are those of all batches, the random state begins anew in each
            written = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList(draws),
                stopping_criteria=StoppingCriteriaList([stopping] if stopping.needed and self.beams == 1 else []),
            )
        for one in draws:
            one.check()
        new = written[:, width:].tolist()
        return [self._completion(row, new[i], stopping.stopped.get(i)) for i, row in enumerate(rows)]

    def _chosen(self, rows: Sequence[_Row], width: int) -> list[_Draws]:
        if self.beams > 1:
            if self._processors is not None or any(row.request.temperature or row.request.stop for row in rows):
                raise RecipeError(
                    f"LocalSampler(beams={self.beams}) searches for the likeliest text: expected requests with "
                    "temperature=0 and no stop texts, and no logits_processors."
                )
            return []
        made = [self._processors(row.request) if callable(self._processors) else self._processors for row in rows]
        plain = self._processors is None and all(row.request.temperature == 0 for row in rows)
        device = next(self.model.parameters()).device
        return [] if plain else [_Draws(rows, [one or () for one in made], width, device)]

    def _completion(self, row: _Row, ids: Sequence[int], stopped: int | None) -> Completion:
        ends = self._ends()
        within = ids[: row.limit if stopped is None else min(stopped, row.limit)]
        end = next((place for place, one in enumerate(within) if one in ends), None)
        kept = within[:end]
        text = self._text(row, kept)
        cuts = [at for at in (text.find(stop) for stop in row.request.stop) if at >= 0]
        complete = end is not None or bool(cuts)
        counts = {"tokens_in": len(row.ids), "tokens_out": len(kept)}
        return Completion(
            text=text[: min(cuts, default=None)],
            status="complete" if complete else "truncated",
            error=None if complete else f"ran into the limit of {row.limit} tokens",
            token_ids=tuple(kept),
            request=row.request.digest,
            end_id=None if end is None else within[end],
            **counts,
        )

    def _text(self, row: _Row, ids: Sequence[int]) -> str:
        """What new tokens spell: after a raw prompt also the space that a tokenizer drops where a text begins."""
        before = [] if row.request.messages else row.ids[-_CONTEXT:]
        context, whole = (str(self.tokenizer.decode(x, skip_special_tokens=True)) for x in (before, [*before, *ids]))
        whole_follows = whole.startswith(context)
        return whole[len(context) :] if whole_follows else str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _ends(self) -> set[int]:
        return end_tokens(self.model, self.tokenizer)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(next(iter(sorted(self._ends())), 0) if pad is None else pad)


class _Draws(LogitsProcessor):
    """Lets each row's processors act, draws its token, and forbids all others."""

    def __init__(
        self, rows: Sequence[_Row], processors: Sequence[Sequence[LogitsProcessor]], width: int, device: torch.device
    ) -> None:
        requests = [row.request for row in rows]
        self._padding = [width - len(row.ids) for row in rows]
        self._processors = processors
        self._uniform = uniform_numbers([one.row_seed for one in requests], max(row.limit for row in rows)).to(device)
        settings = torch.tensor([(one.temperature, one.top_p) for one in requests], dtype=torch.float64)
        self._temperature, self._top_p = settings.T.to(device)
        self._ways = Ways([one.temperature == 0 for one in requests], any(one.top_p < 1 for one in requests))
        self._largest: list[Tensor] = []  # of each step, so that nothing waits for the device before the end
        self._size = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores
        if any(self._processors):
            views = ((input_ids[i : i + 1, start:], scores[i : i + 1]) for i, start in enumerate(self._padding))
            logits = torch.cat([self._processed(i, *view) for i, view in enumerate(views)])
        step, self._size = len(self._largest), logits.shape[1]
        chosen = drawn_tokens(logits, self._uniform[:, step], self._temperature, self._top_p, self._ways)
        self._largest.append(logits.amax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def check(self) -> None:
        """Refuse what was written, if at some step a row had no token to draw."""
        if self._largest:
            check_drawable(torch.stack(self._largest), self._size)

    def _processed(self, row: int, ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self._processors[row]:
            scores = processor(ids, scores)
        return scores


class _RowEnds(StoppingCriteria):
    """Ends each row at its own limit, or when one of its stop texts has been written."""

    def __init__(
        self, rows: Sequence[_Row], tokenizer: PreTrainedTokenizerBase, width: int, device: torch.device
    ) -> None:
        self.stopped: dict[int, int] = {}
        self._tokenizer, self._width = tokenizer, width
        self._limits = torch.tensor([row.limit for row in rows], device=device)
        self._stops = {i: tuple(row.request.stop) for i, row in enumerate(rows) if row.request.stop}
        self.needed = bool(self._stops) or len({row.limit for row in rows}) > 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        count = input_ids.shape[1] - self._width
        done = self._limits <= count
        if not self._stops:
            return done
        most = min(count, max(map(_tail, self._stops.values())))
        ends = [i in self.stopped for i in range(len(done))]
        for i, ids in zip(self._stops, input_ids[list(self._stops), -most:].tolist(), strict=True):
            tail = min(count, _tail(self._stops[i]))
            text = "" if ends[i] else self._tokenizer.decode(ids[-tail:], skip_special_tokens=True)
            if any(stop in text for stop in self._stops[i]):
                self.stopped[i] = count
                ends[i] = True
        return done | torch.tensor(ends, device=done.device)


def _tail(stops: Sequence[str]) -> int:
    """How many tokens may hold the end of a stop text: a character has four bytes at most, and a token one."""
    return 4 * max(map(len, stops)) + 4


def request_ids(tokenizer: PreTrainedTokenizerBase, request: TextRequest) -> list[int]:
    """The token ids that a request asks with, and the special ones that the template or the tokenizer writes."""
    if request.messages:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {name!r} has no chat template, and a model that is asked needs one. Use an "
                "instruction-tuned model, or set tokenizer.chat_template."
            )
        try:
            turns = [dict(turn) for turn in request.messages]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise what they like
            raise DataError(
                f"The chat template of {name!r} refuses the message ({error}). Leave the system text out, or use "
                "another template."
            ) from error
        ids = tokenizer(rendered, add_special_tokens=False).input_ids  # the template writes its own begin token
    else:
        ids = tokenizer(request.prompt).input_ids if isinstance(request.prompt, str) else request.prompt
    if not ids:
        raise DataError(f"The prompt {request.prompt!r} has no token, so nothing can follow it. Give a longer one.")
    return list(ids)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: those of the model's generation settings and the tokenizer's end token."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return {int(one) for one in (*ends, tokenizer.eos_token_id) if one is not None}


def _places(model: Any) -> int | None:
    """How many tokens the model was made for, if it says."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(places) if places else None
