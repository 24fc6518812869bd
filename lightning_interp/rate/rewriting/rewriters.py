"""Who rewrites: the protocol, any Python function, and answers that are there already."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

from lightning_interp.core.storage.files import digest
from lightning_interp.errors import DataError
from lightning_interp.generation.work import called, one_each
from lightning_interp.rate.rewriting.records import Request, RewriteResult, RewriterId, rewrite_key, text_sha
from lightning_interp.rate.rewriting.store import RewriteStore

__all__ = ["CallableRewriter", "ReplayRewriter", "Rewriter", "RowRewriter", "ask", "identity_in", "rewriter_id"]


@runtime_checkable
class Rewriter(Protocol):
    """Anything that writes a text again with another value of the attribute.

    ``name`` and ``rewrite`` are all it needs; answers must not depend on which texts are asked together. It may have:

    - ``params``: its settings as plain values, all that change what it writes (never a key or a password);
    - ``instruction``: how it is asked, as one text;
    - ``batch_size``, ``concurrency``: texts at once, and calls at the same time, from several threads (both 1);
    - ``changes_length``: the attribute is the length, so a change of length is no flaw;
    - ``estimate_tokens(text, prompt, w_target) -> (read, written)``: for a plan of costs;
    - ``stop()``: called when a run breaks off, so that waiting calls end;
    - a further argument ``draws`` of ``rewrite``: which draw of each text is asked for.
    """

    @property
    def name(self) -> str:
        """What to call it; part of the key of each rewrite."""
        ...

    def rewrite(self, texts: Sequence[str], prompts: Sequence[str], w_target: Sequence[int]) -> Sequence[RewriteResult]:
        """Write texts again.

        Args:
            texts: The texts.
            prompts: What each of them answers.
            w_target: The value of the attribute that each new text should have.

        Returns:
            One result a text, in their order.
        """
        ...


def rewriter_id(rewriter: Rewriter) -> RewriterId:
    """Identity of a rewriter: its name with digests of its settings and its instruction."""
    fixed = getattr(rewriter, "identity", None)
    if isinstance(fixed, RewriterId):
        return fixed
    params, instruction = getattr(rewriter, "params", {}), getattr(rewriter, "instruction", "")
    return RewriterId(rewriter.name, digest(params), digest(instruction))


def identity_in(store: RewriteStore, attr: str, rewriter: Rewriter) -> RewriterId:
    """Under which identity a rewriter goes on in a store.

    A rewriter whose way of writing has changed may have ``earlier_params``, its settings as they were: a store that
    was begun with those is continued under that identity, so that what is finished stays.
    """
    now, params = rewriter_id(rewriter), getattr(rewriter, "earlier_params", None)
    if params is None:
        return now
    earlier, there = RewriterId(now.rewriter, digest(params), now.instruction_sha), store.rewriters(attr)
    return earlier if earlier in there and now not in there else now


def ask(rewriter: Rewriter, requests: Sequence[Request]) -> list[RewriteResult]:
    """Ask a rewriter for one result a request."""
    texts, targets = [one.source for one in requests], [one.w_target for one in requests]
    takes_draws = "draws" in inspect.signature(rewriter.rewrite).parameters
    more = {"draws": [one.draw for one in requests]} if takes_draws else {}
    rewrite = cast(Callable[..., Sequence[RewriteResult]], rewriter.rewrite)
    found = rewrite(texts, [one.unit.prompt for one in requests], targets, **more)
    return one_each(f"Rewriter {rewriter.name!r}", found, len(requests), RewriteResult)


class RowRewriter:
    """Rewrites rows of a text, its prompt, the target and the draw."""

    def rewrite(
        self, texts: Sequence[str], prompts: Sequence[str], w_target: Sequence[int], draws: Sequence[int] | None = None
    ) -> list[RewriteResult]:
        """Write each text again; see :class:`Rewriter`."""
        return self._rewrite(list(zip(texts, prompts, w_target, draws or [0] * len(texts), strict=True)))

    def _rewrite(self, rows: Sequence[tuple[str, str, int, int]]) -> list[RewriteResult]:
        return [self._one(*row) for row in rows]

    _one: Callable[[str, str, int, int], RewriteResult]


class CallableRewriter(RowRewriter):
    """A Python function as a rewriter.

    An error that it raises belongs to its text: it is kept with the status ``"error"``, and asked for again in the next
    run. Returning anything but a text or a result raises a ``RecipeError``.

    Args:
        function: Takes a text, its prompt, the target and perhaps ``draw``; returns a text or a :class:`RewriteResult`.
        name: What to call it; the name is part of the key, so change it when the function changes.
        params: Its settings, as plain values.
        instruction: How it asks, as one text.
        concurrency: How many threads may call it at the same time.

    Example:
        >>> shout = CallableRewriter(lambda text, prompt, w: text.upper() if w else text.lower(), name="shout")
        >>> [result.text for result in shout.rewrite(["Oh", "No"], ["", ""], [1, 0])]
        ['OH', 'no']
    """

    def __init__(
        self,
        function: Callable[..., str | RewriteResult],
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        instruction: str = "",
        concurrency: int = 1,
    ) -> None:
        self.name, self.params, self.instruction = name, dict(params or {}), instruction
        self.concurrency, self._function = concurrency, function
        self._draw = "draw" in inspect.signature(function).parameters

    def _one(self, text: str, prompt: str, target: int, draw: int) -> RewriteResult:
        call = partial(self._function, text, prompt, target, **({"draw": draw} if self._draw else {}))
        found: RewriteResult = called(call, f"rewriter {self.name!r}", text, RewriteResult, failed="error")
        return found


class ReplayRewriter(RowRewriter):
    """Answers from a store, and never from anywhere else: a ``DataError`` is raised for what it has not.

    Its identity is that of the rewriter who wrote the store, so what it answers is found again under the same keys.

    Args:
        store: The store, or its folder.
        attr: Name of the attribute.
        rewriter: Whose texts; needed only if several wrote.

    Raises:
        DataError: If nobody has written, or several have and ``rewriter`` names none of them.

    Example:
        >>> import tempfile
        >>> from lightning_interp.rate import RewriteRun, Unit
        >>> store = RewriteStore.create(tempfile.mkdtemp(), [Unit(id="a", text="Oh", w=1)], attr="loud")
        >>> _ = RewriteRun(store, CallableRewriter(lambda text, prompt, w: text.lower(), name="x"), attr="loud").run()
        >>> ReplayRewriter(store, attr="loud").rewrite(["Oh"], [""], [0])[0].text
        'oh'
    """

    batch_size = 1024

    def __init__(self, store: RewriteStore | str, *, attr: str, rewriter: str | RewriterId | None = None) -> None:
        self.store = store if isinstance(store, RewriteStore) else RewriteStore.open(store)
        self.attr = attr
        found = self.store.rewriter_id(attr, rewriter)
        if found is None:
            raise DataError(f"The store {str(self.store.folder)!r} holds no rewrite of {attr!r}. Fill it first.")
        self.identity, self.name = found, found.rewriter

    def _one(self, text: str, prompt: str, target: int, draw: int) -> RewriteResult:
        record = self.store.find(rewrite_key(self.attr, target, text_sha(text), text_sha(prompt), draw, self.identity))
        if record is None:
            raise DataError(
                f"The store {str(self.store.folder)!r} has no rewrite of {text!r:.60} to w={target} (draw {draw}) by "
                f"{self.identity}. Replay only what it holds, or rewrite it first."
            )
        return record.result
