"""A language model behind an OpenAI-compatible endpoint as a rewriter: OpenAI, vLLM, SGLang, ``transformers serve``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import InterpError, RecipeError
from lightning_interp.generation.pacing import Backoff, Bucket, retry_after
from lightning_interp.generation.requests import tokens_of_characters
from lightning_interp.rate.rewriting.records import RewriteResult, text_sha
from lightning_interp.rate.rewriting.templates import RewriteTemplate

__all__ = ["OpenAICompatibleRewriter", "parse_answer"]

_MESSAGE_TOKENS = 8  # what a chat message costs beside its text
_SETUP_IS_WRONG = {401, 403, 404}  # no text can be rewritten before that is repaired


class OpenAICompatibleRewriter:
    """Asks a chat model at an endpoint, one text a call, several calls at a time.

    Failures that may pass (429, 5xx, timeouts, dropped connections) are tried again after an exponential wait with
    full jitter, or what the server asks for in ``Retry-After``. Other refusals belong to their text and are kept as
    errors; a wrong key, model or address ends the run. Needs the package ``openai``.

    Args:
        model: Name of the model.
        template: How it is asked.
        base_url: Address of the endpoint, such as ``http://localhost:8000/v1``; OpenAI's own if None.
        api_key_env: Environment variable that holds the key; the only place a key is taken from. An endpoint with a
            ``base_url`` may need none.
        temperature: Of the sampling; 0.7 is the paper's.
        max_tokens: Tokens of an answer; the endpoint's own limit if None.
        seed: Root seed; each text and draw gets its own, for endpoints that take one. None sends none.
        system_prompt: System text; none is sent if None.
        extra: Further fields of the request, such as ``{"max_completion_tokens": 512}``; part of the key.
        name: What to call it; ``openai:<model>`` if None. The address is no part of the key.
        max_concurrency: Calls at the same time.
        requests_per_minute: Calls a minute; no limit if None.
        tokens_per_minute: Tokens a minute, read and written, estimated beforehand; no limit if None.
        max_retries: Further attempts after a failure that may pass.
        timeout: Seconds that one attempt may take.
        backoff: When to try again.
        sleep: Waits; for tests.
        clock: Seconds that never go back; for tests.

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
        max_concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_retries: int = 6,
        timeout: float = 120.0,
        backoff: Backoff | None = None,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(temperature=temperature, max_concurrency=max_concurrency, max_retries=max_retries, timeout=timeout)
        self.model, self.template, self.seed = model, template, seed
        self.name = name or f"openai:{model}"
        self.concurrency, self.max_retries = max_concurrency, max_retries
        self.changes_length, self.instruction = template.changes_length, template.instruction
        self.params: dict[str, Any] = {
            "model": model,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "system_prompt": system_prompt,
            "extra": dict(extra or {}),
        }
        self._base_url, self._key_name, self._timeout = base_url, api_key_env, timeout
        self._client: Any = None
        self._opening = threading.Lock()
        self._slots = threading.BoundedSemaphore(max_concurrency)
        self._requests = Bucket(requests_per_minute, clock=clock)
        self._tokens = Bucket(tokens_per_minute, clock=clock)
        self._backoff = backoff or Backoff(seed=seed or 0)
        self._sleep = sleep
        self._halt = threading.Event()

    def rewrite(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        w_target: Sequence[int],
        draws: Sequence[int] | None = None,
    ) -> list[RewriteResult]:
        """Ask for each text; see :class:`~lightning_interp.rate.rewriting.rewriters.Rewriter`.

        Raises:
            RecipeError: If the key, the model or the address is wrong.
        """
        rows = list(zip(texts, prompts, w_target, draws or [0] * len(texts), strict=True))
        if len(rows) == 1:
            return [self._one(*rows[0])]
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda row: self._one(*row), rows))

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
        message = {"role": "user", "content": self.template.render(text, w_target=w_target, prompt=prompt)}
        system = self.params["system_prompt"]
        messages = [message] if system is None else [{"role": "system", "content": system}, message]
        body = {"model": self.model, "messages": messages, "temperature": self.params["temperature"]}
        if self.params["max_tokens"] is not None:
            body["max_tokens"] = self.params["max_tokens"]
        if self.seed is not None:
            body["seed"] = derived_seed(self.seed, "rewrite", text_sha(text), text_sha(prompt), w_target, draw) >> 32
        return {**body, **self.params["extra"]}

    def estimate_tokens(self, text: str, prompt: str, w_target: int) -> tuple[int, int]:
        """Tokens that a call would read and write, from the number of characters.

        Args:
            text: The text.
            prompt: What it answers.
            w_target: Value of the attribute to ask for.

        Returns:
            ``(read, written)``; written as many as the text has.
        """
        messages = self.body(text, w_target=w_target, prompt=prompt)["messages"]
        read = sum(tokens_of_characters(message["content"]) + _MESSAGE_TOKENS for message in messages)
        limit = self.params["max_tokens"]
        return read, tokens_of_characters(text) if limit is None else min(limit, tokens_of_characters(text))

    def stop(self) -> None:
        """Let calls that wait for another attempt end now."""
        halt, self._halt = self._halt, threading.Event()
        halt.set()

    def _one(self, text: str, prompt: str, w_target: int, draw: int) -> RewriteResult:
        halt, body = self._halt, self.body(text, w_target=w_target, prompt=prompt, draw=draw)
        estimate = sum(self.estimate_tokens(text, prompt, w_target))
        for attempt in range(self.max_retries + 1):
            self._wait(max(self._requests.take(1), self._tokens.take(estimate)), halt)
            answer, again_after = self._attempt(body)
            if isinstance(answer, RewriteResult) and answer.tokens_in is not None:
                self._tokens.give_back(estimate - (answer.tokens_in + (answer.tokens_out or 0)))
            if isinstance(answer, RewriteResult):
                return answer
            if attempt < self.max_retries:
                self._wait(self._backoff.seconds(attempt, at_least=again_after), halt)
        return RewriteResult(text=None, status="error", error=f"{self.max_retries + 1} attempts: {answer}"[:500])

    def _attempt(self, body: Mapping[str, Any]) -> tuple[RewriteResult | str, float]:
        """One call: its result, or what failed and how long the server wants to be left alone."""
        openai, client = _openai(), self._opened()
        try:
            with self._slots:
                answer = client.chat.completions.with_raw_response.create(**_split(body))
                return parse_answer(answer.http_response.json()), 0.0
        except openai.APIStatusError as error:
            status, reason = error.status_code, self._redacted(f"{error.status_code}: {error.message}")
            if status in _SETUP_IS_WRONG:
                raise RecipeError(
                    f"The endpoint {self._address()} refuses model {self.model!r} ({reason:.300}). Check the key in "
                    f"${self._key_name}, the model's name and base_url."
                ) from None
            if status == 429 or status >= 500:
                return reason, retry_after(error.response.headers)
            return RewriteResult(text=None, status="error", error=reason[:500]), 0.0
        except (openai.APIError, ValueError) as error:  # no connection, no answer in time, or half an answer
            return self._redacted(f"{type(error).__name__}: {error}"), 0.0

    def _opened(self) -> Any:
        with self._opening:
            if self._client is None:
                key = os.environ.get(self._key_name, "")
                if not key and self._base_url is None:
                    raise RecipeError(
                        f"No key for OpenAI: the environment variable {self._key_name} is not set. Set it, or give the "
                        "base_url of another endpoint."
                    )
                self._client = _openai().OpenAI(
                    api_key=key or "none", base_url=self._base_url, max_retries=0, timeout=self._timeout
                )
            return self._client

    def _address(self) -> str:
        return "of OpenAI" if self._base_url is None else repr(self._base_url.rpartition("@")[2])

    def _redacted(self, text: str) -> str:
        key = os.environ.get(self._key_name, "")
        return text.replace(key, "***") if key else text

    def _wait(self, seconds: float, halt: threading.Event) -> None:
        if seconds > 0 and self._sleep is not None:
            self._sleep(seconds)
        elif seconds > 0:
            halt.wait(seconds)
        if halt.is_set():
            raise InterpError(f"The run was stopped while {self.name!r} waited to call again. Start it again.")


def parse_answer(body: Any) -> RewriteResult:
    """Read the answer of a chat completion.

    Args:
        body: The response, as the chat-completions protocol has it.

    Returns:
        The result: ``truncated`` if the answer ran into the limit of tokens, ``refused`` if the model or a filter
        refused, ``empty`` without a text.

    Example:
        >>> choice = {"message": {"content": " A fine film. "}, "finish_reason": "stop"}
        >>> parse_answer({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}).text
        'A fine film.'
    """
    usage = _object(body, "usage")
    counts = {"tokens_in": usage.get("prompt_tokens"), "tokens_out": usage.get("completion_tokens")}
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
        return RewriteResult(text=None, status="error", error=f"an answer without choices: {body!r:.200}", **counts)
    message, reason = _object(choices[0], "message"), choices[0].get("finish_reason")
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else None
    refusal = message.get("refusal")
    if refusal or reason == "content_filter":
        return RewriteResult(text=text, status="refused", error=str(refusal or reason)[:500], **counts)
    if reason == "length":
        return RewriteResult(text=text, status="truncated", error="ran into the limit of tokens", **counts)
    return RewriteResult(text=text, status="ok" if text else "empty", **counts)


def _object(row: Any, key: str) -> Mapping[str, Any]:
    value = row.get(key) if isinstance(row, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _split(body: Mapping[str, Any]) -> dict[str, Any]:
    """Named arguments of the client, and whatever else is sent as it is."""
    named = ("model", "messages", "temperature", "max_tokens", "seed")
    rest = {key: value for key, value in body.items() if key not in named}
    return {**{key: body[key] for key in named if key in body}, **({"extra_body": rest} if rest else {})}


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise RecipeError(
            "OpenAICompatibleRewriter needs the package openai, which is not installed. Install it with "
            "`pip install 'lightning-interp[endpoint]'`."
        ) from error
    return openai


def _check(*, temperature: float, max_concurrency: int, max_retries: int, timeout: float) -> None:
    if not temperature >= 0:
        raise RecipeError(f"temperature={temperature!r}; expected at least 0.")
    if max_concurrency < 1:
        raise RecipeError(f"max_concurrency={max_concurrency!r}; expected at least 1.")
    if max_retries < 0:
        raise RecipeError(f"max_retries={max_retries!r}; expected at least 0.")
    if not timeout > 0:
        raise RecipeError(f"timeout={timeout!r}; expected seconds, more than 0.")
