"""A language model behind an OpenAI-compatible endpoint as a writer: OpenAI, vLLM, SGLang, ``transformers serve``."""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.storage.redaction import check_address, check_no_secret, keep_secret, redacted
from lightning_interp.errors import InterpError, RecipeError
from lightning_interp.generation.answers import parse_answer, token_counts
from lightning_interp.generation.pacing import LONGEST_WAIT, Backoff, Bucket, Pace, retry_after
from lightning_interp.generation.requests import Completion, TextRequest, estimate_tokens

__all__ = ["EndpointGenerator", "parse_answer"]

_SETUP_IS_WRONG = {401, 403, 404}  # nothing can be written before that is repaired
_MOST_DIGITS = 300  # of a whole number: what a float can still hold
_MOST_CANDIDATES = 20  # how many likely tokens the protocol tells


class EndpointGenerator:
    """Asks a model at an endpoint, one request a call, several calls at a time; needs the package ``openai``.

    Conversations go to chat completions, raw prompts to completions. Failures that may pass (429, 5xx, timeouts,
    dropped connections) are tried again after a jittered exponential wait, or what ``Retry-After`` asks for, up to ten
    minutes (a warning tells of more). Other refusals belong to their request and are kept as failures; a wrong key,
    model or address ends the run.

    Args:
        model: Name of the model.
        base_url: Address of the endpoint, such as ``http://localhost:8000/v1``; OpenAI's own if None.
        api_key_env: Environment variable that alone gives the key; an endpoint with a ``base_url`` may need none.
        send_seed: Send each request's own seed, for endpoints that take one.
        extra: Further fields of each call, such as ``{"reasoning_effort": "low"}``; part of the identity.
        name: What to call it; ``openai:<model>`` if None. The address is no part of the identity.
        pace: How many calls at a time and a minute, and when to try again.

    Raises:
        RecipeError: If an argument has a wrong value.

    Example:
        >>> writer = EndpointGenerator("llama", base_url="http://localhost:8000/v1")
        >>> body = writer.body(TextRequest.chat("Hi", temperature=0.5, max_new_tokens=9))
        >>> body["messages"], body["temperature"], body["max_tokens"]
        ([{'role': 'user', 'content': 'Hi'}], 0.5, 9)
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        send_seed: bool = True,
        extra: Mapping[str, Any] | None = None,
        name: str | None = None,
        pace: Pace | None = None,
    ) -> None:
        pace = pace or Pace()
        check_address(base_url)
        check_no_secret(extra or {}, "extra")
        keep_secret(api_key_env)
        self.model, self.name, self.send_seed = model, name or f"openai:{model}", send_seed
        self.extra, self.concurrency, self.pace = dict(extra or {}), pace.max_concurrency, pace
        self._base_url, self._key_name = base_url, api_key_env
        self._client: Any = None
        self._opening = threading.Lock()
        self._slots = threading.BoundedSemaphore(pace.max_concurrency)
        self._requests = Bucket(pace.requests_per_minute, clock=pace.clock)
        self._tokens = Bucket(pace.tokens_per_minute, clock=pace.clock)
        self._backoff = pace.backoff or Backoff()
        self._halt = threading.Event()

    def identity(self) -> dict[str, Any]:
        """Name, model, and what else is sent."""
        name, model = self.name, self.model
        return {"kind": "endpoint", "name": name, "model": model, "extra": self.extra, "send_seed": self.send_seed}

    def generate(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """Ask for each request.

        Raises:
            RecipeError: If the key, the model or the address is wrong, or the package is missing.
            InterpError: If :meth:`stop` was called while a request waited.
        """
        return self._all(self._one, requests)

    def next_token_probs(self, requests: Sequence[TextRequest], texts: Sequence[str]) -> Tensor:
        """Probability that an answer begins with each of some texts, such as digits, as far as the endpoint tells.

        Args:
            requests: Conversations.
            texts: Candidates of one token each.

        Returns:
            Float64 ``[requests, texts]``; 0 for what is not among the likeliest tokens, NaN where there is no answer.
        """
        rows = self._all(lambda request: self._first_token(request, texts), requests)
        return torch.tensor(rows, dtype=torch.float64).reshape(len(requests), len(texts))

    def first_tokens(self, requests: Sequence[TextRequest]) -> list[tuple[Completion, list[tuple[str, float]]]]:
        """Ask for each request, and for the likeliest tokens that its answer could have begun with.

        Args:
            requests: Conversations.

        Returns:
            For each the completion, and up to 20 tokens with their probabilities; none where the endpoint tells none.

        Raises:
            RecipeError: As :meth:`generate`.
        """
        return self._all(self._with_first, requests)

    def body(self, request: TextRequest) -> dict[str, Any]:
        """A request as the protocol has it; also what a batch file holds.

        Args:
            request: The request.
        """
        if request.messages:
            asked: dict[str, Any] = {"messages": [dict(turn) for turn in request.messages]}
        else:
            asked = {"prompt": request.prompt if isinstance(request.prompt, str) else list(request.prompt or ())}
        more = {
            "max_tokens": request.max_new_tokens,
            "top_p": None if request.top_p == 1 else request.top_p,
            "stop": list(request.stop) or None,
            "seed": request.row_seed >> 32 if self.send_seed else None,
        }
        sent = {name: value for name, value in more.items() if value is not None}
        return {"model": self.model, **asked, "temperature": request.temperature, **sent, **self.extra}

    estimate_tokens = staticmethod(estimate_tokens)

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask another path of the endpoint, such as ``models``, once.

        Args:
            path: Below ``base_url``.
            body: What is posted there; without one it is only read.

        Returns:
            The answer, from JSON; the text if it is none.

        Raises:
            RecipeError: If the endpoint refuses, or cannot be reached.
        """
        openai, client = _openai(), self._opened()
        try:
            how = {} if body is None else {"body": dict(body)}
            text = (client.get if body is None else client.post)(f"/{path}", cast_to=str, **how)
        except openai.APIError as error:
            if isinstance(error.__cause__, RecipeError):
                raise error.__cause__ from None
            reason = redacted(f"{getattr(error, 'status_code', type(error).__name__)}: {error.message}")
            raise RecipeError(
                f"The endpoint {self._address()} did not answer {path!r} for {dict(body or {})!r:.200} ({reason:.300})."
                " Check that it runs, offers this, and sees the files that are named."
            ) from None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def stop(self) -> None:
        """Let calls that wait for another attempt end now."""
        halt, self._halt = self._halt, threading.Event()
        halt.set()

    def _all(self, one: Any, requests: Sequence[TextRequest]) -> list[Any]:
        if len(requests) == 1:
            return [one(requests[0])]
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, requests))

    def _one(self, request: TextRequest) -> Completion:
        answer = self._answer(self.body(request), sum(self.estimate_tokens(request)))
        found = answer if isinstance(answer, Completion) else parse_answer(answer[0])
        return replace(found, request=request.digest)

    def _with_first(self, request: TextRequest, **more: Any) -> tuple[Completion, list[tuple[str, float]]]:
        body = self.body(request) | {"logprobs": True, "top_logprobs": _MOST_CANDIDATES} | more
        answer = self._answer(body, sum(self.estimate_tokens(request)))
        if isinstance(answer, Completion):
            return replace(answer, request=request.digest), []
        try:
            told = answer[0]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            likely = [(str(row["token"]), math.exp(row["logprob"])) for row in told]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):  # an endpoint that tells none
            likely = []
        return replace(parse_answer(answer[0]), request=request.digest), likely

    def _first_token(self, request: TextRequest, texts: Sequence[str]) -> list[float]:
        likely = self._with_first(request, max_tokens=1)[1]
        return [sum(p for token, p in likely if token.strip() == text) if likely else math.nan for text in texts]

    def _answer(self, body: Mapping[str, Any], estimate: int) -> tuple[Any] | Completion:
        """What the server answers in the end, or the failure."""
        halt, reason = self._halt, ""
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Completion(text=None, status="failed", error="the request holds half of a character; not sent")
        for attempt in range(self.pace.max_retries + 1):
            self._wait(max(self._requests.take(1), self._tokens.take(estimate)), halt)
            answer, reason, again_after = self._attempt(body)
            read, written = token_counts(answer[0]) if isinstance(answer, tuple) else (None, None)
            if read is not None:
                self._tokens.give_back(estimate - read - (written or 0))
            if answer is not None:
                return answer
            if again_after > LONGEST_WAIT:
                warnings.warn(
                    f"The endpoint {self._address()} asks to be left alone for {again_after:.3g} seconds; it is called "
                    f"again after {LONGEST_WAIT:g}. Stop the run if it cannot answer before.",
                    stacklevel=2,
                )
            if attempt < self.pace.max_retries:
                self._wait(self._backoff.seconds(attempt, at_least=min(again_after, LONGEST_WAIT)), halt)
        return Completion(text=None, status="failed", error=f"{self.pace.max_retries + 1} attempts: {reason}"[:500])

    def _attempt(self, body: Mapping[str, Any]) -> tuple[tuple[Any] | Completion | None, str, float]:
        """One call: what came of it; or None, what failed and how long the server wants to be left alone."""
        openai, client = _openai(), self._opened()
        way, asked = (client.chat.completions, "messages") if "messages" in body else (client.completions, "prompt")
        more = {key: value for key, value in body.items() if key not in ("model", asked)}
        call = {"model": body["model"], asked: body[asked], "extra_body": more}
        try:
            with self._slots:
                answer = way.with_raw_response.create(**call).http_response
            return (redacted(json.loads(answer.content, parse_int=_integer)),), "", 0.0
        except RecursionError:
            return Completion(text=None, status="failed", error="an answer nested too deeply"), "", 0.0
        except RecipeError:  # another address, which gets no texts
            raise
        except openai.APIStatusError as error:
            status, reason = error.status_code, redacted(f"{error.status_code}: {error.message}")
            if status in _SETUP_IS_WRONG:
                raise RecipeError(
                    f"The endpoint {self._address()} refuses model {self.model!r} ({reason:.300}). Check the key in "
                    f"${self._key_name}, the model's name and base_url."
                ) from None
            if status == 429 or status >= 500:
                return None, reason, retry_after(error.response.headers)
            return Completion(text=None, status="failed", error=reason[:500]), "", 0.0
        except (openai.APIError, ValueError) as error:  # no connection, no answer in time, or half an answer
            if isinstance(error.__cause__, RecipeError):
                raise error.__cause__ from None
            return None, redacted(f"{type(error).__name__}: {error}"), 0.0

    def _opened(self) -> Any:
        with self._opening:
            if self._client is None:
                key = os.environ.get(self._key_name, "")
                if not key and self._base_url is None:
                    raise RecipeError(
                        f"No key for OpenAI: the environment variable {self._key_name} is not set. Set it, or give the "
                        "base_url of another endpoint."
                    )
                openai = _openai()
                self._client = openai.OpenAI(
                    api_key=key or "none",
                    base_url=self._base_url,
                    max_retries=0,
                    timeout=self.pace.timeout,
                    http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._check_host]}),
                )
                self._host = _host(self._client.base_url)
            return self._client

    def _address(self) -> str:
        return "of OpenAI" if self._base_url is None else repr(self._base_url)

    def _check_host(self, request: Any) -> None:
        """Called before anything is sent, also where an answer leads to another address."""
        asked = _host(request.url)
        if asked != self._host and asked != ("https", self._host[1], None):
            raise RecipeError(
                f"The endpoint {self._address()} sends requests on to {request.url.host!r}, which gets no texts. If "
                "you trust that address, give it as base_url."
            )

    def _wait(self, seconds: float, halt: threading.Event) -> None:
        if seconds > 0:
            (self.pace.sleep or halt.wait)(seconds)
        if halt.is_set():
            raise InterpError(f"The run was stopped while {self.name!r} waited to call again. Start it again.")


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < _MOST_DIGITS else math.inf


def _host(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise RecipeError(
            "An endpoint needs the package openai, which is not installed. Install it with "
            "`pip install 'lightning-interp[endpoint]'`."
        ) from error
    return openai
