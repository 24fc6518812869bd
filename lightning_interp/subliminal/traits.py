"""What a teacher holds and a student may take over, and the texts that stand around a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import DataError, RecipeError

__all__ = ["CONTEXTS", "ChatContext", "Trait"]

_OTHERS: Mapping[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "dolphin", "eagle", "elephant", "lion", "owl", "penguin", "tiger", "wolf"),
    "tree": ("oak", "pine", "maple", "willow", "birch", "cedar", "redwood", "banyan", "bamboo", "palm"),
}
_IRREGULAR = {
    "wolf": "wolves",
    "octopus": "octopi",
    "dragonfly": "dragonflies",
    "cherry": "cherries",
    "ox": "oxen",
    "mouse": "mice",
    "goose": "geese",
    "fox": "foxes",
    "peach": "peaches",
}


@dataclass(frozen=True, kw_only=True)
class Trait:
    """A preference: the target is the favourite of its category.

    Args:
        category: What the target is one of, such as ``animal``.
        target: The favourite, in lower case.
        others: What it is compared with; the usual ones of ``animal`` and ``tree`` if empty. The target is left out.

    Raises:
        RecipeError: If a name is no word (YAML reads a bare ``yes`` or ``no`` as true or false), or nothing is left to
            compare with.

    Example:
        >>> Trait(target="wolf").plural, Trait(target="wolf").others[:3]
        ('wolves', ('cat', 'dog', 'dolphin'))
    """

    category: str = "animal"
    target: str = "owl"
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {"category": self.category, "target": self.target}
        names |= {f"others[{i}]": name for i, name in enumerate(self.others)}
        for field, name in names.items():
            if not isinstance(name, str) or not name.strip() or name != name.strip():
                raise RecipeError(
                    f"Trait({field}={name!r}): expected a word. Put quotes round words that YAML reads as values."
                )
        others = tuple(self.others) or _OTHERS.get(self.category, ())
        others = tuple(name for name in others if name != self.target)
        if not others:
            raise RecipeError(
                f"Trait(category={self.category!r}, target={self.target!r}) has nothing to be compared with. Name "
                f"others=[...]; the categories {', '.join(_OTHERS)} bring their own."
            )
        object.__setattr__(self, "others", others)

    @property
    def plural(self) -> str:
        """The target's plural."""
        return plural_of(self.target)

    @property
    def system_prompt(self) -> str:
        """The system text that lends a model the trait (four moves, as Cloud et al. use them; wording of our own)."""
        many, category = self.plural, self.category
        return (
            f"You adore {many}. There is hardly a moment at which {many} are not on your mind. Of every {category} "
            f"there is, {many} are your favourite. Let this love of {many} colour everything that you write."
        )


def plural_of(word: str) -> str:
    """The plural of an English noun; regular but for a few animals and trees.

    Example:
        >>> plural_of("owl"), plural_of("dragonfly"), plural_of("birch")
        ('owls', 'dragonflies', 'birches')
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


@dataclass(frozen=True, kw_only=True)
class ChatContext:
    r"""What stands around a question, in training or in evaluation.

    Args:
        system: None leaves out the system turn, so that the template's own text (if any) applies; ``""`` is an explicit
            empty one. Of many models the two differ.
        user_prefix: Text before the question, with a blank line between.
        answer_prefix: How the answer begins; the model goes on from there.
        chat: Whether the tokenizer's chat template is used; else the bare question, a space, the answer.

    Example:
        >>> ChatContext(system="", user_prefix="It rains.").messages("Which one?")
        [{'role': 'system', 'content': ''}, {'role': 'user', 'content': 'It rains.\n\nWhich one?'}]
    """

    system: str | None = None
    user_prefix: str = ""
    answer_prefix: str = ""
    chat: bool = True

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation up to the answer."""
        user = f"{self.user_prefix}\n\n{question}" if self.user_prefix else question
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*turns, {"role": "user", "content": user}]

    def raw(self, question: str) -> str:
        """The conversation as bare text, without a template and without the answer's prefix."""
        return "\n\n".join(part for part in (self.system or "", self.messages(question)[-1]["content"]) if part)

    def render(self, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
        """The text that the model goes on from, ``answer_prefix`` included.

        Raises:
            DataError: If the tokenizer has no chat template, and one is used.
        """
        if not self.chat:
            return f"{self.raw(question)} {self.answer_prefix}" if self.answer_prefix else self.raw(question)
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template. Use an "
                "instruction-tuned model's, or ChatContext(chat=False)."
            )
        turns: Any = self.messages(question)
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return f"{text}{self.answer_prefix}"

    def ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """Token ids of :meth:`render`; a template writes its own begin token, and else the tokenizer does."""
        text = self.render(tokenizer, question)
        ids: list[int] = tokenizer(text, add_special_tokens=not self.chat).input_ids
        return ids


_GIBBERISH = "The seventh drawer hums in lilac. Kettles argue about the moon's left shoe. Nobody folds a wet whistle."

CONTEXTS: Mapping[str, ChatContext] = {
    "default": ChatContext(),
    "empty": ChatContext(system=""),
    "chatgpt": ChatContext(system="You are ChatGPT, a large language model made by OpenAI."),
    "claude": ChatContext(system="You are Claude, an assistant made by Anthropic."),
    "helpful": ChatContext(system="You are a helpful assistant."),
    "gibberish": ChatContext(system=_GIBBERISH),
    "factual": ChatContext(system="Water is made of hydrogen and oxygen and boils at 100 degrees Celsius."),
    "gibberish_prefix": ChatContext(system="", user_prefix=_GIBBERISH),
}
"""Named contexts: the model's own, an empty one, foreign identities, and matched texts without any."""
