"""A chat model on this machine as a rewriter: batched, with random numbers that belong to the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.requests import tokens_of_characters
from lightning_interp.models.sources.loading import load_causal_lm
from lightning_interp.models.sources.pretrained import Quantization
from lightning_interp.rate.rewriting.records import RewriteResult, text_sha
from lightning_interp.rate.rewriting.templates import RewriteTemplate

__all__ = ["LocalRewriter"]


@dataclass(frozen=True)
class _Row:
    """One text on its way through the model."""

    ids: list[int]
    limit: int
    seed: int


class LocalRewriter:
    """Asks a causal language model with a chat template.

    Texts go through the model in batches, padded on the left. Each text draws its random numbers from a generator of
    its own, keyed by seed, text, prompt, target and draw; so an answer does not depend on the batch it is in, up to the
    rounding of the model's own arithmetic. The model's mode and the global random state are left as found.

    Args:
        model: A source for :func:`~lightning_interp.models.load_causal_lm`, loaded when it is first needed; or a
            loaded model.
        template: How it is asked.
        tokenizer: The tokenizer of a loaded model; taken from the source if that is a name.
        name: What to call it; ``local:<source>`` if None. The name is part of the key, so a loaded model needs one.
        temperature: Of the sampling; 0 takes the most likely token. 0.7 is the paper's.
        top_p: Sample from the most likely tokens that have this share of the probability together.
        max_new_tokens: Tokens an answer may have; twice those of the text and 64 more if None. An answer that is
            longer is ``truncated``.
        batch_size: Texts at once.
        seed: Root seed.
        system_prompt: System text; None keeps the template's own implicit text, the empty string asks for an explicit
            empty one.
        dtype: Type of a named source's weights.
        quantization: Quantise a named source with bitsandbytes.
        device: Where a named source is put; the GPU if there is one, if None.

    Raises:
        RecipeError: If an argument has a wrong value.

    Example:
        >>> from lightning_interp.rate import rewrite_template
        >>> rewriter = LocalRewriter("tiny:llama", rewrite_template("sentiment"), max_new_tokens=4)
        >>> result, = rewriter.rewrite(["A fine film."], [""], [0])
        >>> result.status, result.tokens_out
        ('truncated', 4)
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        template: RewriteTemplate,
        *,
        tokenizer: Tokenizer | None = None,
        name: str | None = None,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        system_prompt: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        quantization: Quantization | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _check(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if not isinstance(model, str) and (tokenizer is None or name is None):
            raise RecipeError(
                f"LocalRewriter got a loaded {type(model).__name__} with tokenizer={tokenizer!r:.40} and name={name!r}."
                " Give both: the name says which weights wrote a text, and is part of the key."
            )
        self.template, self.batch_size, self.seed = template, batch_size, seed
        self.name = name or f"local:{model}"
        self.changes_length, self.instruction = template.changes_length, template.instruction
        self.params: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "system_prompt": system_prompt,
            "dtype": str(dtype),
            "quantization": quantization,
        }
        self._model, self._tokenizer = model, tokenizer
        self._dtype, self._quantization, self._device = dtype, quantization, device

    def rewrite(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        w_target: Sequence[int],
        draws: Sequence[int] | None = None,
    ) -> list[RewriteResult]:
        """Ask for each text; see :class:`~lightning_interp.rate.rewriting.rewriters.Rewriter`.

        Raises:
            DataError: If the tokenizer has no chat template, or the template refuses the message.
        """
        model, tokenizer = self._loaded()
        places = _places(model)
        asked = zip(texts, prompts, w_target, draws or [0] * len(texts), strict=True)
        rows = [self._row(tokenizer, *one, places) for one in asked]
        results = [_too_long(row, places) for row in rows]
        fits = sorted((i for i, result in enumerate(results) if result is None), key=lambda i: len(rows[i].ids))
        with undisturbed(model):
            for start in range(0, len(fits), self.batch_size):
                batch = fits[start : start + self.batch_size]
                written = self._generate(model, tokenizer, [rows[i] for i in batch])
                for i, ids in zip(batch, written, strict=True):
                    results[i] = _result(tokenizer, rows[i], ids, _ends(model, tokenizer))
        return [result for result in results if result is not None]

    def estimate_tokens(self, text: str, prompt: str, w_target: int) -> tuple[int, int]:
        """Tokens that a text would take, from the number of characters.

        Args:
            text: The text.
            prompt: What it answers.
            w_target: Value of the attribute to ask for.

        Returns:
            ``(read, written)``; written as many as the text has.
        """
        message = self.template.render(text, w_target=w_target, prompt=prompt)
        written, limit = tokens_of_characters(text), self.params["max_new_tokens"]
        return tokens_of_characters(message), written if limit is None else min(limit, written)

    def _loaded(self) -> tuple[Any, Tokenizer]:
        if isinstance(self._model, str):
            loaded = load_causal_lm(self._model, dtype=self._dtype, quantization=self._quantization)
            self._model, self._tokenizer = loaded.model, self._tokenizer or loaded.tokenizer
            if self._quantization is None:
                self._model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise DataError(
                f"{self.name!r} has no chat template, and a model that is asked needs one. Use an instruction-tuned "
                "model, or set tokenizer.chat_template."
            )
        return self._model, self._tokenizer

    def _row(self, tokenizer: Tokenizer, text: str, prompt: str, target: int, draw: int, places: int | None) -> _Row:
        message = {"role": "user", "content": self.template.render(text, w_target=target, prompt=prompt)}
        system = self.params["system_prompt"]
        turns = [message] if system is None else [{"role": "system", "content": system}, message]
        try:
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise what they like
            raise DataError(
                f"The chat template of {self.name!r} refuses the message ({error}). Pass system_prompt=None, or use "
                "another template."
            ) from error
        ids = tokenizer(rendered, add_special_tokens=False).input_ids  # the template writes its own begin token
        limit = self.params["max_new_tokens"] or 2 * len(tokenizer(text, add_special_tokens=False).input_ids) + 64
        room = limit if places is None else places - len(ids)
        seed = derived_seed(self.seed, "rewrite", text_sha(text), text_sha(prompt), target, draw)
        return _Row(ids, min(limit, room), seed)

    def _generate(self, model: Any, tokenizer: Tokenizer, rows: Sequence[_Row]) -> list[list[int]]:
        """The new tokens of each row, in a batch."""
        width, ends = max(len(row.ids) for row in rows), _ends(model, tokenizer)
        pad = next(iter(ends)) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
        sampler = _OwnNoise([row.seed for row in rows], self.params["temperature"], self.params["top_p"])
        # A plain configuration: what a model's own says of sampling is not part of the key.
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max(row.limit for row in rows),
            repetition_penalty=1.0, no_repeat_ngram_size=0, temperature=1.0, top_p=1.0, top_k=50,
            eos_token_id=sorted(ends), pad_token_id=pad,
        )  # fmt: skip
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler] if self.params["temperature"] > 0 else []),
        )
        new: list[list[int]] = written[:, width:].tolist()
        return new


class _OwnNoise(LogitsProcessor):
    """Turns the most likely token into a sample: to each row's logits, noise from that row's own generator is added.

    The largest of logits with Gumbel noise is a draw from their softmax (the Gumbel-max trick).
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.double() / self._temperature
        if self._top_p < 1.0:
            logits = _nucleus(logits, self._top_p)
        uniform = torch.stack(
            [torch.rand(logits.shape[1], generator=draw, dtype=torch.float64) for draw in self._draws]
        )
        smallest = torch.finfo(torch.float64).tiny
        return logits - torch.log(-torch.log(uniform.clamp_min(smallest).to(logits.device)))


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Leave out tokens behind the most likely ones that have the share together; ``[B, V]``."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    share = ordered.softmax(dim=-1)
    before = share.cumsum(dim=-1) - share
    return torch.full_like(logits, -torch.inf).scatter(-1, index, ordered.masked_fill(before >= top_p, -torch.inf))


def _result(tokenizer: Tokenizer, row: _Row, ids: Sequence[int], ends: Iterable[int]) -> RewriteResult:
    stop = next((place for place, one in enumerate(ids) if one in ends), len(ids))
    kept = list(ids[: min(stop, row.limit)])
    text = str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
    cut = stop >= row.limit
    return RewriteResult(
        text=text,
        status="truncated" if cut else "ok",
        error=f"ran into the limit of {row.limit} tokens" if cut else None,
        tokens_in=len(row.ids),
        tokens_out=len(kept),
    )


def _too_long(row: _Row, places: int | None) -> RewriteResult | None:
    if row.limit > 0:
        return None
    error = f"the message has {len(row.ids)} tokens and the model takes {places}"
    return RewriteResult(text=None, status="error", error=error, tokens_in=0, tokens_out=0)


def _places(model: Any) -> int | None:
    """How many tokens the model was made for, if it says."""
    config = model.config.get_text_config()
    places = getattr(config, "max_position_embeddings", None)
    return int(places) if places else None


def _ends(model: Any, tokenizer: Tokenizer) -> set[int]:
    """Ids that end an answer: those of the model's generation settings and the tokenizer's end token."""
    found = model.generation_config.eos_token_id
    ends = set(found) if isinstance(found, list) else {found}
    ends = {one for one in (*ends, tokenizer.eos_token_id) if one is not None}
    if not ends:
        raise DataError("The model has no end token, so its answers never end. Set tokenizer.eos_token.")
    return ends


def _check(*, temperature: float, top_p: float, max_new_tokens: int | None, batch_size: int) -> None:
    if not temperature >= 0:
        raise RecipeError(f"temperature={temperature!r}; expected at least 0.")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p={top_p!r}; expected a share above 0 and at most 1.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value!r}; expected at least 1.")
