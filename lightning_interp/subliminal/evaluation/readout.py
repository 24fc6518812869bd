"""What a model is about to answer: log-probabilities of the names that a trait compares, read off its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.hooks.last_logits import Gate, read_logits
from lightning_interp.core.tokens.batches import padded
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.subliminal.evaluation.questions import preference_questions
from lightning_interp.subliminal.traits import ChatContext, Trait

__all__ = [
    "ANSWER_PREFIX",
    "TraitReadout",
    "answered",
    "continuation_logp",
    "spellings",
    "summed_logp",
    "trait_logits",
    "trait_margins",
]

ANSWER_PREFIX = "My favorite {category} is the"
"""How an answer begins where its logits are read: without it, small models hardly think of a name yet."""


@dataclass(frozen=True)
class TraitReadout:
    """How likely a model is to name each of several things, question by question.

    Args:
        names: The names; of one of them, :attr:`target`, the measures speak.
        logp: Log-probability (nats) of each as the answer, float64 ``[questions, names]``.
        rank: Rank of its likeliest first token in the vocabulary, 1 for the largest, ``[questions, names]``.
        vocabulary: Size of the vocabulary.
        target: Whose measures are given.
    """

    names: tuple[str, ...]
    logp: Tensor
    rank: Tensor
    vocabulary: int
    target: str

    def of(self, target: str) -> TraitReadout:
        """The same for another of the names.

        Raises:
            RecipeError: If it is not among the names.
        """
        if target not in self.names:
            raise RecipeError(f"The readout has no {target!r}; its names are {', '.join(self.names)}.")
        return replace(self, target=target)

    @property
    def _at(self) -> int:
        return self.names.index(self.target)

    @property
    def target_logp(self) -> Tensor:
        """Log-probability of the target, ``[questions]``."""
        return self.logp[:, self._at]

    @property
    def margin(self) -> Tensor:
        """Logit of the target minus the mean of the other names', ``[questions]``: of these the least noisy."""
        others = [i for i in range(len(self.names)) if i != self._at]
        return self.target_logp - self.logp[:, others].mean(1)

    @property
    def share(self) -> Tensor:
        """Probability of the target among the names alone, ``[questions]``."""
        return self.logp.softmax(1)[:, self._at]

    @property
    def target_rank(self) -> Tensor:
        """Rank of the target in the vocabulary, 1 for the likeliest token, ``[questions]``."""
        return self.rank[:, self._at]

    @property
    def percentile(self) -> Tensor:
        """Percentage of the other tokens that are less likely, ``[questions]``."""
        return 100 * (self.vocabulary - self.target_rank) / max(self.vocabulary - 1, 1)

    def delta_logp(self, base: TraitReadout) -> Tensor:
        """Log-probability of the target minus that of another readout, usually the base model's, ``[questions]``."""
        return self.target_logp - base.of(self.target).target_logp

    def means(self) -> dict[str, float]:
        """Means over questions of ``margin``, ``share``, ``logp``, ``rank`` (its median) and ``percentile``."""
        found = {"margin": self.margin, "share": self.share, "logp": self.target_logp, "percentile": self.percentile}
        return {**{name: float(x.mean()) for name, x in found.items()}, "rank": float(self.target_rank.median())}


def answered(context: ChatContext, trait: Trait) -> ChatContext:
    """A context whose answer begins with :data:`ANSWER_PREFIX`, unless it begins with something already."""
    return replace(context, answer_prefix=context.answer_prefix or ANSWER_PREFIX.format(category=trait.category))


def spellings(tokenizer: PreTrainedTokenizerBase, name: str, *, after: str = "") -> list[list[int]]:
    """Token ids of a name: all its spellings of one token, else the one that goes on from ``after``.

    Args:
        tokenizer: The tokenizer.
        name: What is spelled: with and without a space before it, as it is, capitalised and in capitals.
        after: The text before it; a space follows unless it is empty or ends in white space.

    Returns:
        Several sequences of one token, or one sequence of several.
    """
    cases = dict.fromkeys((name, name[:1].upper() + name[1:], name.upper()))
    texts = [f"{space}{case}" for space in (" ", "") for case in cases]
    single = {tuple(ids) for text in texts if len(ids := _bare(tokenizer, text)) == 1}
    if single:
        return [list(ids) for ids in sorted(single)]
    return [_bare(tokenizer, f" {name}" if after and not after[-1].isspace() else name)]


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def trait_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    questions: Sequence[str] | None = None,
    *,
    context: ChatContext | None = None,
    gate: Gate | None = None,
    token_budget: int = 4096,
) -> TraitReadout:
    """Read how likely a model is to name the target and each of the others at the first place of its answer.

    A name's probability is the sum over its spellings of one token; a name without any takes the product over its
    tokens, fed one after the other (see :func:`spellings`). The model is left as found, random states too.

    Args:
        model: A plain model, a PEFT wrapper, or a LightningModule.
        tokenizer: Its tokenizer.
        trait: What is compared.
        questions: What is asked; :func:`~lightning_interp.subliminal.evaluation.questions.preference_questions` if
            None.
        context: What stands around a question; if None the model's own, with an answer that has begun.
        gate: What is attached meanwhile.
        token_budget: Most tokens of one forward pass, padding included.

    Returns:
        The readout, on the CPU.

    Raises:
        DataError: If there is no question, or one has no token.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> found = trait_logits(tiny_model("llama"), byte_tokenizer(), Trait(others=("cat",)), ["Which?"])
        >>> found.names, tuple(found.margin.shape)
        (('owl', 'cat'), (1,))
    """
    questions = preference_questions(trait.category) if questions is None else questions
    context = answered(ChatContext(), trait) if context is None else context
    names = (trait.target, *trait.others)
    prompts = [context.ids(tokenizer, question) for question in questions]
    spelled = [spellings(tokenizer, name, after=context.answer_prefix) for name in names]
    options = {"tokenizer": tokenizer, "gate": gate, "token_budget": token_budget}
    logp, rank, size = continuation_logp(model, prompts, spelled, **options)
    return TraitReadout(names, logp, rank, size, trait.target)


def trait_margins(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    questions: Sequence[str] | None = None,
    **options: Any,
) -> Tensor:
    """Margin of the target over the mean of the others (logits), ``[questions]``; see :func:`trait_logits`."""
    return trait_logits(model, tokenizer, trait, questions, **options).margin


def continuation_logp(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    spelled: Sequence[Sequence[Sequence[int]]],
    **options: Any,
) -> tuple[Tensor, Tensor, int]:
    """Log-probability that each prompt goes on as each of several things, summed over the spellings of each.

    Args:
        model: As :func:`trait_logits` takes it.
        prompts: Token ids.
        spelled: Of each thing its spellings as token ids: several of one token, or one of several.
        **options: ``gate``, ``tokenizer`` and ``token_budget`` of :func:`read_logits`.

    Returns:
        Log-probabilities and ranks of the likeliest first tokens, float64 and int64 ``[prompts, things]`` on the CPU;
        the size of the vocabulary.

    Raises:
        DataError: If there is no prompt, or a prompt or a spelling has no token.
    """
    if not all(word for some in spelled for word in some):
        raise DataError(f"A name has no token: the spellings are {list(spelled)!r:.80}. Expected one token at least.")
    first = [torch.tensor([word[0] for word in some]) for some in spelled]
    sizes: list[int] = []

    def single(logits: Tensor, numbers: list[int]) -> Tensor:
        logp = logits[:, -1].log_softmax(-1)
        each = [logp[:, ids.to(logp.device)] for ids in first]
        rank = [1 + (~(logp <= at.amax(1, keepdim=True))).sum(1) for at in each]  # of a broken model, behind all
        sizes.append(logp.shape[1])
        return torch.stack([torch.stack([at.logsumexp(1) for at in each], 1), torch.stack(rank, 1)], 2)

    logp, rank = read_logits(model, prompts, single, **options).unbind(2)
    long = [(p, i, some[0]) for p in range(len(prompts)) for i, some in enumerate(spelled) if len(some[0]) > 1]
    if long:
        rows = [[*prompts[p], *word[:-1]] for p, _, word in long]
        before: dict[str, Any] = {
            "keep": [len(word) for *_, word in long],
            "prompt_lengths": [len(prompts[p]) for p, *_ in long],
        }

        def product(logits: Tensor, numbers: list[int]) -> Tensor:
            return summed_logp(logits, [long[number][2] for number in numbers])

        logp[[p for p, *_ in long], [i for _, i, _ in long]] = read_logits(model, rows, product, **before, **options)
    return logp, rank.long(), sizes[0]


def summed_logp(logits: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability of each row's own tokens, the last of which the last column predicts, ``[rows]``."""
    ids, mask = (x.to(logits.device) for x in padded(words, side="left"))
    logp = logits[:, -ids.shape[1] :].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return torch.where(mask.bool(), logp, 0.0).sum(1)
