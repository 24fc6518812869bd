"""Language models as rewriters: a template in front of whoever writes texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.endpoint import EndpointGenerator
from lightning_interp.generation.pacing import Backoff, Pace
from lightning_interp.generation.requests import (
    TextGenerator,
    TextRequest,
    ask,
    check_sampling,
    estimate_tokens,
    tokens_of_characters,
)
from lightning_interp.generation.sampler import LocalSampler
from lightning_interp.models.sources.loading import load_causal_lm
from lightning_interp.models.sources.pretrained import Quantization
from lightning_interp.rate.rewriting.records import RewriteResult, as_result, text_sha
from lightning_interp.rate.rewriting.rewriters import RowRewriter
from lightning_interp.rate.rewriting.templates import RewriteTemplate

__all__ = ["LocalRewriter", "OpenAICompatibleRewriter", "TemplateRewriter"]


class TemplateRewriter(RowRewriter):
    """Asks any writer of texts for rewrites, in the words of a template.

    Args:
        generator: Who writes.
        template: How it is asked.
        name: What to call it; part of the key of each rewrite.
        seed: Root seed; each text, prompt, target and draw has random numbers of its own.
        system_prompt: System text; None keeps the template's own implicit text, ``""`` asks for an empty one.
        **sampling: ``temperature`` (0.7, the paper's), ``top_p`` and ``max_new_tokens`` of each request.

    Example:
        >>> from lightning_interp.generation import FunctionGenerator
        >>> from lightning_interp.rate import rewrite_template
        >>> echo = FunctionGenerator(lambda request: request.text[-24:], name="echo")
        >>> TemplateRewriter(echo, rewrite_template("length"), name="echo").rewrite(["Oh."], [""], [1])[0].text
        'Give only the new text.'
    """

    def __init__(
        self,
        generator: TextGenerator | None,
        template: RewriteTemplate,
        *,
        name: str,
        seed: int = 0,
        system_prompt: str | None = None,
        **sampling: Any,
    ) -> None:
        self.template, self.name, self.seed, self.system_prompt = template, name, seed, system_prompt
        self.changes_length, self.instruction = template.changes_length, template.instruction
        self.sampling, self._generator = {"temperature": 0.7, "max_new_tokens": None, **sampling}, generator
        self.params: dict[str, Any] = {**self.sampling, "seed": seed, "system_prompt": system_prompt}
        if generator is not None:
            self.params["writer"] = dict(generator.identity())
            self.batch_size = int(getattr(generator, "batch_size", 1))
            self.concurrency = int(getattr(generator, "concurrency", 1))

    def _rewrite(self, rows: Sequence[tuple[str, str, int, int]]) -> list[RewriteResult]:
        requests = [self.request(text, w_target=w, prompt=prompt, draw=draw) for text, prompt, w, draw in rows]
        return [as_result(one) for one in ask(self._writer(), requests)]

    def request(self, text: str, *, w_target: int, prompt: str = "", draw: int = 0) -> TextRequest:
        """What is asked for one text.

        Args:
            text: The text.
            w_target: Value of the attribute to ask for.
            prompt: What the text answers.
            draw: Number of the draw.

        Returns:
            The request.
        """
        return TextRequest.chat(
            self.template.render(text, w_target=w_target, prompt=prompt),
            system=self.system_prompt,
            seed=self.seed,
            key=("rewrite", text_sha(text), text_sha(prompt), w_target, draw),
            **self.sampling,
        )

    def estimate_tokens(self, text: str, prompt: str, w_target: int) -> tuple[int, int]:
        """Tokens that a text would take, from the number of characters.

        Args:
            text: The text.
            prompt: What it answers.
            w_target: Value of the attribute to ask for.

        Returns:
            ``(read, written)``; written as many as the text has.
        """
        read, _ = estimate_tokens(TemplateRewriter.request(self, text, w_target=w_target, prompt=prompt))
        written, limit = tokens_of_characters(text), self.sampling["max_new_tokens"]
        return read, written if limit is None else min(limit, written)

    def stop(self) -> None:
        """Let calls that wait end now."""
        getattr(self._generator, "stop", lambda: None)()

    def _writer(self) -> Any:
        return self._generator


class LocalRewriter(TemplateRewriter):
    """Asks a causal language model with a chat template on this machine.

    A :class:`~lightning_interp.generation.sampler.LocalSampler` writes, so an answer does not depend on its batch. A
    store that an earlier version filled with these settings is continued under its keys.

    Args:
        model: A loaded model, or a source for :func:`~lightning_interp.models.load_causal_lm`, loaded when needed.
        template: How it is asked.
        tokenizer: The tokenizer of a loaded model; taken from the source if that is a name.
        name: What to call it; ``local:<source>`` if None. The name is part of the key, so a loaded model needs one.
        temperature: Of the sampling; 0 takes the most likely token. 0.7 is the paper's.
        top_p: Sample from the most likely tokens that have this share of the probability together.
        max_new_tokens: Tokens before an answer is ``truncated``; twice those of the text and 64 more if None.
        batch_size: Texts at once.
        seed: Root seed.
        system_prompt: System text; None keeps the template's own implicit text, ``""`` asks for an empty one.
        dtype, quantization, device: Of a named source: its weights, by bitsandbytes, and where (a GPU if there is).

    Raises:
        RecipeError: If an argument has a wrong value.

    Example:
        >>> from lightning_interp.rate import rewrite_template
        >>> rewriter = LocalRewriter("tiny:llama", rewrite_template("sentiment"), max_new_tokens=4)
        >>> rewriter.rewrite(["A fine film."], [""], [0])[0].tokens_out
        4
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
        sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        check_sampling(**sampling, batch_size=batch_size)  # type: ignore[arg-type]
        if not isinstance(model, str) and (tokenizer is None or name is None):
            raise RecipeError(
                f"LocalRewriter got a loaded {type(model).__name__} with tokenizer={tokenizer!r:.40} and name={name!r}."
                " Give both: the name says which weights wrote a text, and is part of the key."
            )
        name, self.batch_size = name or f"local:{model}", batch_size
        super().__init__(None, template, name=name, seed=seed, system_prompt=system_prompt, **sampling)
        self.earlier_params = {**self.params, "dtype": str(dtype), "quantization": quantization}
        self.params = {**self.earlier_params, "sampler": 2}  # 1 drew a number for each token of the vocabulary
        self._model, self._tokenizer = model, tokenizer
        self._dtype, self._quantization, self._device = dtype, quantization, device

    def request(self, text: str, *, w_target: int, prompt: str = "", draw: int = 0) -> TextRequest:
        """What is asked for one text; see :class:`TemplateRewriter`."""
        asked = super().request(text, w_target=w_target, prompt=prompt, draw=draw)
        if asked.max_new_tokens is not None:
            return asked
        tokens = self._writer().tokenizer(text, add_special_tokens=False).input_ids
        return replace(asked, max_new_tokens=2 * len(tokens) + 64)

    def _writer(self) -> Any:
        if self._generator is not None:
            return self._generator
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
        self._generator = LocalSampler(self._model, self._tokenizer, batch_size=self.batch_size)
        return self._generator


class OpenAICompatibleRewriter(TemplateRewriter):
    """Asks a chat model at an endpoint, one text a call, several calls at a time.

    An :class:`~lightning_interp.generation.endpoint.EndpointGenerator` calls; it says what happens when calls fail.

    Args:
        model: Name of the model.
        template: How it is asked.
        base_url: Address of the endpoint, such as ``http://localhost:8000/v1``; OpenAI's own if None.
        api_key_env: Environment variable that alone gives the key; an endpoint with a ``base_url`` may need none.
        temperature: Of the sampling; 0.7 is the paper's.
        max_tokens: Tokens of an answer; the endpoint's own limit if None.
        seed: Root seed; each text and draw gets its own, for endpoints that take one. None sends none.
        system_prompt: System text; none is sent if None.
        extra: Further fields of the request, such as ``{"max_completion_tokens": 512}``; part of the key.
        name: What to call it; ``openai:<model>`` if None. The address is no part of the key.
        **pace: How fast it is called: fields of :class:`~lightning_interp.generation.pacing.Pace`.

    Raises:
        RecipeError: If an argument has a wrong value, the package is missing, or the key is not in the environment.

    Example:
        >>> from lightning_interp.rate import rewrite_template
        >>> rewriter = OpenAICompatibleRewriter("llama", rewrite_template("length"), base_url="http://localhost:8000/v1")
        >>> rewriter.name, rewriter.changes_length, rewriter.body("Hi", w_target=1)["temperature"]
        ('openai:llama', True, 0.7)
    """

    def __init__(
        self,
        model: str,
        template: RewriteTemplate,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.7,
        max_tokens: int | None = None,
        seed: int | None = None,
        system_prompt: str | None = None,
        extra: Mapping[str, Any] | None = None,
        name: str | None = None,
        **pace: Any,
    ) -> None:
        check_sampling(temperature=temperature)
        how = Pace(**{"backoff": Backoff(seed=seed or 0), **pace})
        where: dict[str, Any] = {"base_url": base_url, "api_key_env": api_key_env}
        self.endpoint = EndpointGenerator(model, send_seed=seed is not None, extra=extra, name=name, pace=how, **where)
        asked: dict[str, Any] = {"temperature": temperature, "system_prompt": system_prompt}
        named = self.endpoint.name
        super().__init__(self.endpoint, template, name=named, seed=seed or 0, max_new_tokens=max_tokens, **asked)
        self.params = {"model": model, **asked, "max_tokens": max_tokens, "seed": seed, "extra": dict(extra or {})}

    def body(self, text: str, *, w_target: int, prompt: str = "", draw: int = 0) -> dict[str, Any]:
        """The request for one text, as the chat-completions protocol has it.

        Args:
            text: The text.
            w_target: Value of the attribute to ask for.
            prompt: What the text answers.
            draw: Number of the draw.

        Returns:
            The body; also what a batch file holds.
        """
        return self.endpoint.body(self.request(text, w_target=w_target, prompt=prompt, draw=draw))
