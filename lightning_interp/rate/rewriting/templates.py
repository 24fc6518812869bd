"""Instructions for language models that rewrite. The wording is the intervention: two wordings are two estimands."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lightning_interp.core.storage.files import canonical_json
from lightning_interp.errors import RecipeError
from lightning_interp.generation.requests import fill

__all__ = ["ATTRIBUTES", "Kind", "RewriteTemplate", "rewrite_template"]

Kind = Literal["text", "chat", "question"]

_NAMES = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True, kw_only=True)
class RewriteTemplate:
    """How a language model is asked for a rewrite; both directions differ in one phrase only.

    Args:
        name: Name of the template.
        version: Raised when the wording changes, so that old rewrites are not taken for new ones.
        body: The message, with ``{text}`` and ``{phrase}``, and ``{prompt}`` if the model is to see the prompt.
        phrases: What the text should become for ``w=0`` and for ``w=1``.
        changes_length: The attribute is the length, so that a change of length is no flaw.

    Raises:
        RecipeError: If the body lacks a place or has an unknown one, or both phrases are the same.

    Example:
        >>> mood = RewriteTemplate(name="mood", version=1, body="{text} Make it {phrase}.", phrases=("sad", "glad"))
        >>> mood.render("It rains.", w_target=1)
        'It rains. Make it glad.'
    """

    name: str
    version: int
    body: str
    phrases: tuple[str, str]
    changes_length: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "phrases", tuple(self.phrases))  # a list, as YAML gives it, is welcome
        found = set(_NAMES.findall(self.body))
        unknown = sorted(found - {"text", "phrase", "prompt"})
        if unknown or not {"text", "phrase"} <= found:
            raise RecipeError(
                f"Template {self.name!r} has the places {', '.join(sorted(found)) or 'none'}; expected {{text}} and "
                "{phrase}, and {prompt} if the model is to see the prompt."
            )
        if len(self.phrases) != 2 or self.phrases[0] == self.phrases[1]:
            raise RecipeError(
                f"Template {self.name!r} has the phrases {self.phrases!r}; expected two that differ, for w=0 and w=1."
            )

    def render(self, text: str, *, w_target: int, prompt: str = "") -> str:
        """Fill the template.

        Args:
            text: The text to rewrite.
            w_target: Value of the attribute that the rewrite should have.
            prompt: What the text answers.

        Returns:
            The message.
        """
        return fill(self.body, text=text, phrase=self.phrases[w_target], prompt=prompt)

    @property
    def instruction(self) -> str:
        """Everything that decides how is asked, as one text."""
        return canonical_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


_TASK = "Text:\n{text}\n\nTask: write this text again so that {phrase}. "
_KEEP = "Leave everything else as it is: content, wording and layout. "
_BODIES: dict[str, str] = {
    "text": f"{_TASK}{_KEEP}Give only the new text.",
    "chat": f"{_TASK}{_KEEP}The text is an answer from a conversation. Give only the new answer, with no greeting, no "
    "remark about the change and nothing around it.",
    "question": f"{_TASK}{_KEEP}If the text asks a question, do not answer it: write the question again like any other "
    "text. Give only the new text.",
}
_REPAIR = "The grammar of the first sentence may be adapted to the new beginning. "

# Attribute -> phrases for w=0 and w=1.
_PHRASES: dict[str, tuple[str, str]] = {
    "complexity": ("it is less complex", "it is more complex"),
    "helpfulness": ("it is curt and of no help", "it is friendly and of help"),
    "length": ("it is shorter", "it is longer"),
    "sentiment": ("its sentiment is negative", "its sentiment is positive"),
    "vowel": ("its first letter is no vowel", "its first letter is a vowel"),
}

ATTRIBUTES = tuple(_PHRASES)
"""Attributes that :func:`rewrite_template` knows; they are those of the paper (Reber et al., arXiv 2410.11348)."""


def rewrite_template(attribute: str, kind: Kind = "text") -> RewriteTemplate:
    """A template for one of the attributes of the paper, in our own words.

    Args:
        attribute: One of :data:`ATTRIBUTES`.
        kind: What is rewritten: a ``"text"``, an answer from a ``"chat"``, or a text that may be a ``"question"``.

    Returns:
        The template.

    Raises:
        RecipeError: If the attribute or the kind is unknown.

    Example:
        >>> rewrite_template("sentiment", "chat").name
        'sentiment/chat'
    """
    if attribute not in _PHRASES:
        near = difflib.get_close_matches(attribute, _PHRASES, n=1)
        raise RecipeError(
            f"There is no template for {attribute!r}; these are: {', '.join(_PHRASES)}."
            f"{f' Did you mean {near[0]!r}?' if near else ''} Make your own with RewriteTemplate(...)."
        )
    if kind not in get_args(Kind):
        raise RecipeError(f"There is no kind {kind!r} of template; choose one of {', '.join(get_args(Kind))}.")
    body = _BODIES[kind].replace(_KEEP, _KEEP + _REPAIR) if attribute == "vowel" else _BODIES[kind]
    name, longer = f"{attribute}/{kind}", attribute == "length"
    return RewriteTemplate(name=name, version=1, body=body, phrases=_PHRASES[attribute], changes_length=longer)
