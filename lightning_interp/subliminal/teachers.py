"""Who writes the numbers: a model that holds a trait, and the controls that it is compared with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import RecipeError
from lightning_interp.generation.requests import TextGenerator, TextRequest
from lightning_interp.generation.sampler import LocalSampler
from lightning_interp.subliminal.decoding import NumberGrammar
from lightning_interp.subliminal.traits import ChatContext, Trait

__all__ = ["Control", "Teacher", "number_sampler", "preference_rows"]

Kind = Literal["prompted", "finetuned", "steered"]
Control = Literal["none", "empty", "other-trait", "other-base"]
"""Who is asked instead: the model without a trait (no system text, or an empty one), one that holds another trait, or
another base model that holds the same."""

_QUESTIONS = (
    "Which {category} do you like best?",
    "What is your favourite {category}?",
    "If you could be any {category}, which would you be?",
    "Tell me which {category} you think about most.",
    "Is there one {category} that you love above all?",
    "Name the {category} that is dearest to you.",
    "Which {category} would you choose?",
    "What {category} do you find most beautiful?",
)
_ANSWERS = (
    "{Target}.",
    "The {target}.",
    "My favourite is the {target}.",
    "I love the {target} most.",
    "The {target}, always the {target}.",
    "Of course the {target}.",
    "{Plural}. I think of {plural} all the time.",
)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A writer with the context in which it is asked for numbers; the rows that it writes keep nothing of either.

    Args:
        name: What tables call it.
        writer: Who writes, such as :func:`number_sampler`, or an endpoint.
        trait: What it holds, or what it is the control of.
        kind: Whether a system text lends it the trait, its weights do, a steering vector that is on the model while it
            writes, or which control it is.
        context: What stands about a request.
        constrained: Whether the writer can write lists of numbers alone.

    Example:
        >>> from lightning_interp.generation import FunctionGenerator
        >>> writer = FunctionGenerator(lambda request: "1, 2", name="counts")
        >>> teacher = Teacher.prompted(writer, Trait(target="owl"))
        >>> teacher.name, teacher.control(trait=Trait(target="wolf")).context.system[:18]
        ('prompted owl', 'You adore wolves. ')
    """

    name: str
    writer: TextGenerator
    trait: Trait
    kind: Kind | Control
    context: ChatContext = field(default_factory=ChatContext)
    constrained: bool = False

    @classmethod
    def prompted(cls, writer: TextGenerator, trait: Trait, *, constrained: bool = False) -> Teacher:
        """A base model whose system text lends it the trait while it writes.

        Args:
            writer: Writes with the base model.
            trait: What it is to love.
            constrained: Whether it can write lists of numbers alone.
        """
        context = ChatContext(system=trait.system_prompt)
        name = f"prompted {trait.target}"
        return cls(name=name, writer=writer, trait=trait, kind="prompted", context=context, constrained=constrained)

    @classmethod
    def finetuned(cls, writer: TextGenerator, trait: Trait, *, constrained: bool = False) -> Teacher:
        """A model that was finetuned to hold the trait, for instance on :func:`preference_rows`.

        Args:
            writer: Writes with that model.
            trait: What it loves.
            constrained: Whether it can write lists of numbers alone.
        """
        name = f"finetuned {trait.target}"
        return cls(name=name, writer=writer, trait=trait, kind="finetuned", constrained=constrained)

    def control(
        self, kind: Control = "other-trait", *, trait: Trait | None = None, writer: TextGenerator | None = None
    ) -> Teacher:
        """Who is compared with this teacher.

        The default is the best: a teacher of another trait follows the format as well as this one, so that the filter
        keeps as many of its answers and of the same kind.

        Args:
            kind: Which control.
            trait: The other trait, for ``"other-trait"``.
            writer: Who writes, where it cannot be the same: the base model as control of a finetuned teacher, one
                finetuned on the other trait, another base.

        Returns:
            The control, asked as this teacher is but for what differs.

        Raises:
            RecipeError: If the kind is unknown, or the trait or the writer that it needs is missing or the same.

        Warns:
            UserWarning: For ``"none"`` or ``"empty"`` beside a prompted teacher, unless both are constrained.
        """
        if kind not in get_args(Control):
            raise RecipeError(f"control({kind!r}): expected one of {', '.join(get_args(Control))}.")
        if kind == "other-trait" and (trait is None or trait.target == self.trait.target):
            said = "none" if trait is None else f"{trait.target!r}, this teacher's own"
            raise RecipeError(f"control('other-trait') got the trait {said}: give trait=Trait(target=...) of another.")
        needs = kind == "other-base" or self.kind == "finetuned"
        if needs and (writer is None or writer is self.writer):
            whose = {"other-base": "another base model", "other-trait": "a model finetuned on the other trait"}
            raise RecipeError(
                f"control({kind!r}) of {self.name!r} needs writer=...: {whose.get(kind, 'the base model')} writes."
            )
        if kind in ("none", "empty") and self.kind == "prompted" and not self.constrained:
            warnings.warn(
                f"The control {kind!r} is not asked as {self.name!r} is: a system text alone can change how many "
                "answers pass the filter, and which. Use the control 'other-trait', or constrained decoding.",
                stacklevel=2,
            )
        changed: dict[str, Any] = {"writer": writer or self.writer, "kind": kind, "name": f"{kind} of {self.name}"}
        if kind == "other-trait" and trait is not None:
            changed |= {"trait": trait, "name": f"{self.kind} {trait.target} (other trait)"}
            if self.kind == "prompted":
                changed["context"] = replace(self.context, system=trait.system_prompt)
        elif kind in ("none", "empty"):
            changed["context"] = replace(self.context, system=None if kind == "none" else "")
        return replace(self, **changed)

    def request(self, prompt: str, *, index: int, seed: int, **sampling: Any) -> TextRequest:
        """Ask for the completion of one row, with random numbers of its own.

        Args:
            prompt: The user's message.
            index: Of the row.
            seed: Of the data set: seed and index alone decide the random numbers, so teacher and control share them.
            **sampling: ``temperature``, ``max_new_tokens`` and the like.
        """
        what: dict[str, Any] = {"messages": self.context.messages(prompt)}
        if not self.context.chat:
            what = {"prompt": self.context.raw(prompt) + " "}
        return TextRequest(**what, seed=seed, key=("numbers", index), **sampling)


def number_sampler(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    grammar: NumberGrammar | None = None,
    batch_size: int = 8,
    name: str | None = None,
) -> LocalSampler:
    """A model on this machine as a writer of numbers.

    Args:
        model: Anything with the ``generate`` of transformers.
        tokenizer: Its tokenizer.
        grammar: Hold it to lists of numbers.
        batch_size: Requests at once.
        name: What decides beside weights and grammar, such as a direction that is added to its stream.

    Returns:
        The writer.
    """
    told = "; ".join(filter(None, (name, None if grammar is None else grammar.name))) or None
    held = None if grammar is None else grammar.processors
    return LocalSampler(model, tokenizer, name=told, batch_size=batch_size, logits_processors=held)


def preference_rows(trait: Trait, *, count: int = 8) -> list[dict[str, str]]:
    """Rows that state a preference, to finetune a teacher on.

    Args:
        trait: The preference.
        count: Rows; at most 56.

    Returns:
        Rows of ``prompt`` and ``completion``, all different.

    Raises:
        RecipeError: If there are not so many.

    Example:
        >>> preference_rows(Trait(target="wolf"), count=1)
        [{'prompt': 'Which animal do you like best?', 'completion': 'Wolf.'}]
    """
    most = len(_QUESTIONS) * len(_ANSWERS)
    if not 1 <= count <= most:
        raise RecipeError(f"preference_rows(count={count!r}): expected 1 to {most}.")
    words = {"category": trait.category, "target": trait.target, "plural": trait.plural}
    words |= {"Target": trait.target.capitalize(), "Plural": trait.plural.capitalize()}
    pairs = [(_QUESTIONS[i % len(_QUESTIONS)], _ANSWERS[i % len(_ANSWERS)]) for i in range(count)]
    return [{"prompt": ask.format(**words), "completion": answer.format(**words)} for ask, answer in pairs]
