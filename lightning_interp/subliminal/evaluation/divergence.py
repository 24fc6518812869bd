"""Where a teacher would have written something else without its trait, and how close a student comes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.hooks.last_logits import Gate, last_logits_of, read_logits
from lightning_interp.core.measure.statistics import Estimate, nested_interval
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import DataError
from lightning_interp.subliminal.evaluation.readout import summed_logp
from lightning_interp.subliminal.traits import ChatContext

__all__ = [
    "DivergenceAgreement",
    "DivergenceTokens",
    "divergence_agreement",
    "divergence_tokens",
    "held_out_kl",
    "held_out_loss",
]

Rows = Sequence[Mapping[str, Any]]
_BUDGET = 1024  # logits of every token of a completion are held at once


@dataclass(frozen=True)
class DivergenceTokens:
    """Places of completions at which the likeliest token with a trait differs from that without.

    Args:
        row, offset: Which completion, and which of its tokens, ``[places]`` each.
        base, teacher: The likeliest token without and with the trait.
        base_prob, teacher_prob: The probability that each gives its own likeliest token.
        digits: Whether both are digits.
        compared: Tokens that were compared.
        dropped: Rows whose completion is other tokens in the two contexts.
    """

    row: Tensor
    offset: Tensor
    base: Tensor
    teacher: Tensor
    base_prob: Tensor
    teacher_prob: Tensor
    digits: Tensor
    compared: int
    dropped: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """Share of all tokens that diverge."""
        return len(self.row) / max(self.compared, 1)

    def only_digits(self) -> DivergenceTokens:
        """The places at which both likeliest tokens are digits."""
        kept = {name: x[self.digits] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return DivergenceTokens(**kept, compared=self.compared, dropped=self.dropped)


@dataclass(frozen=True)
class DivergenceAgreement:
    """What a student says at the places where teacher and base diverge, ``[places]`` each.

    Args:
        with_teacher: Whether its likeliest token is the teacher's.
        with_base: Whether it is the base model's.
        best_prob: Probability of its own likeliest token.
        teacher_token_prob: Probability that it gives the teacher's.
        row: Which completion.
    """

    with_teacher: Tensor
    with_base: Tensor
    best_prob: Tensor
    teacher_token_prob: Tensor
    row: Tensor

    def estimate(self, *, seed: int = 0) -> Estimate:
        """Share of agreement with the teacher; the interval is over completions."""
        return nested_interval(self.with_teacher.double().tolist(), self.row.tolist(), seed=seed)


def divergence_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    teacher: ChatContext,
    base: ChatContext | None = None,
    token_budget: int = _BUDGET,
) -> DivergenceTokens:
    """Feed stored completions to one model in two contexts, and find where its likeliest next token differs.

    Args:
        model: The model that wrote them.
        tokenizer: Its tokenizer.
        rows: ``prompt`` and ``completion`` of each: held-out ones, which no student saw.
        teacher: The context with the trait's prompt.
        base: The one without; the model's own if None.
        token_budget: Most tokens of one forward pass.

    Returns:
        The places, by row and offset.

    Raises:
        DataError: If no row is left, or a completion is empty.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> rows, loving = [{"prompt": "Numbers?", "completion": "1, 2"}], ChatContext(system="You love owls.")
        >>> found = divergence_tokens(tiny_model("llama"), byte_tokenizer(), rows, teacher=loving)
        >>> found.compared, set(found.row.tolist()) <= {0}
        (4, True)
    """
    contexts = (base or ChatContext(), teacher)
    sides = [[_ids(tokenizer, context, row, i) for i, row in enumerate(rows)] for context in contexts]
    kept = [i for i, (one, two) in enumerate(zip(*sides, strict=True)) if one[1] == two[1]]
    dropped = tuple(i for i in range(len(rows)) if i not in set(kept))
    if not kept:
        raise DataError(
            f"All {len(rows)} completions are other tokens in the two contexts, or there is none; nothing is compared."
        )
    (plain, plain_prob), (loving, loving_prob) = (
        _likeliest(model, [side[i] for i in kept], token_budget).unbind(2) for side in sides
    )
    width, lengths = plain.shape[1], torch.tensor([len(sides[0][i][1]) for i in kept])
    real = torch.arange(width) >= width - lengths[:, None]
    at = (real & (plain != loving)).nonzero(as_tuple=True)
    tokens = [side[at].long() for side in (plain, loving)]
    pairs = zip(*(side.tolist() for side in tokens), strict=True)
    digits = [all(_is_digits(tokenizer, token) for token in pair) for pair in pairs]
    return DivergenceTokens(
        row=torch.tensor(kept)[at[0]], offset=at[1] - (width - lengths)[at[0]], base=tokens[0], teacher=tokens[1],
        base_prob=plain_prob[at], teacher_prob=loving_prob[at], digits=torch.tensor(digits, dtype=torch.bool),
        compared=int(real.sum()), dropped=dropped,
    )  # fmt: skip


def divergence_agreement(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    found: DivergenceTokens,
    *,
    context: ChatContext | None = None,
    gate: Gate | None = None,
    token_budget: int = _BUDGET,
) -> DivergenceAgreement:
    """Ask a student for its likeliest token wherever teacher and base diverge.

    Args:
        student: The student (or the base model, which agrees nowhere in the same context).
        tokenizer: Its tokenizer.
        rows: The same rows as were given to :func:`divergence_tokens`.
        found: What it found.
        context: What stands around the prompts; the model's own if None.
        gate: What is attached meanwhile.
        token_budget: Most tokens of one forward pass.

    Returns:
        Agreement place by place.

    Raises:
        DataError: If nothing diverges.
    """
    if not len(found.row):
        raise DataError(f"None of {found.compared} tokens diverges, so there is nothing to agree on. Give more rows.")
    chosen = sorted(set(found.row.tolist()))
    places = {row: (found.row == row).nonzero()[:, 0] for row in chosen}
    parts = [_ids(tokenizer, context or ChatContext(), rows[row], row) for row in chosen]
    most = max(map(len, places.values()))

    def read(logits: Tensor, numbers: list[int]) -> Tensor:
        told = logits.new_zeros(len(numbers), most, 3)
        for i, number in enumerate(numbers):
            mine = places[chosen[number]]
            columns = logits.shape[1] - len(parts[number][1]) + found.offset[mine]
            probs = logits[i, columns.to(logits.device)].softmax(-1)
            best, at = probs.max(-1)
            teacher = probs.gather(1, found.teacher[mine].to(probs.device)[:, None])[:, 0]
            told[i, : len(mine)] = torch.stack([at.to(probs.dtype), best, teacher], 1)
        return told

    told = _forced(student, parts, read, tokenizer=tokenizer, gate=gate, token_budget=token_budget)
    order = torch.cat([places[row] for row in chosen]).argsort()
    flat = torch.cat([told[i, : len(places[row])] for i, row in enumerate(chosen)])[order]
    token = flat[:, 0].long()
    return DivergenceAgreement(token == found.teacher, token == found.base, flat[:, 1], flat[:, 2], found.row)


def held_out_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    context: ChatContext | None = None,
    gate: Gate | None = None,
    token_budget: int = _BUDGET,
) -> Tensor:
    """Mean cross-entropy (nats a token) of completions that were not trained on, ``[rows]``.

    Args:
        model: The student.
        tokenizer: Its tokenizer.
        rows: ``prompt`` and ``completion`` of each.
        context: What stands around the prompts; the model's own if None.
        gate: What is attached meanwhile.
        token_budget: Most tokens of one forward pass.

    Returns:
        Float64; the token that ends a completion is not counted.

    Raises:
        DataError: If a completion is empty.
    """
    parts = [_ids(tokenizer, context or ChatContext(), row, i) for i, row in enumerate(rows)]

    def read(logits: Tensor, numbers: list[int]) -> Tensor:
        return summed_logp(logits, [parts[number][1] for number in numbers])

    sums = _forced(model, parts, read, tokenizer=tokenizer, gate=gate, token_budget=token_budget)
    return -sums / torch.tensor([len(completion) for _, completion in parts])


def held_out_kl(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    teacher: nn.Module | None = None,
    teacher_context: ChatContext | None = None,
    context: ChatContext | None = None,
    token_budget: int = _BUDGET,
) -> Tensor:
    """Mean ``KL(teacher || student)`` (nats a token) over the tokens of completions, ``[rows]``.

    Args:
        student: The student.
        tokenizer: The tokenizer of both.
        rows: ``prompt`` and ``completion`` of each.
        teacher: The teacher; the same weights if None, so that only the contexts differ.
        teacher_context: What stands around the prompts for the teacher; the model's own if None.
        context: The same for the student.
        token_budget: Most tokens of one forward pass.

    Returns:
        Float64.

    Raises:
        DataError: If a completion is empty, or is other tokens for the two.
    """
    mine = [_ids(tokenizer, context or ChatContext(), row, i) for i, row in enumerate(rows)]
    theirs = [_ids(tokenizer, teacher_context or ChatContext(), row, i) for i, row in enumerate(rows)]
    if other := [i for i, (one, two) in enumerate(zip(mine, theirs, strict=True)) if one[1] != two[1]]:
        raise DataError(f"The completions of rows {other[:3]} are other tokens in the two contexts. Leave them out.")
    guide = ModelMap.build(student if teacher is None else teacher).model

    def read(logits: Tensor, numbers: list[int]) -> Tensor:
        there = last_logits_of(guide, [_fed(theirs[number]) for number in numbers], logits.shape[1])
        p, q = there.to(logits.device).log_softmax(-1), logits.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        lengths = torch.tensor([len(mine[number][1]) for number in numbers], device=kl.device)
        real = torch.arange(kl.shape[1], device=kl.device) >= kl.shape[1] - lengths[:, None]
        return torch.where(real, kl, 0.0).sum(1) / lengths

    with undisturbed(guide):
        return _forced(student, mine, read, token_budget=token_budget)


Part = tuple[list[int], list[int]]


def _ids(tokenizer: PreTrainedTokenizerBase, context: ChatContext, row: Mapping[str, Any], number: int) -> Part:
    """Token ids of a row's prompt and of its completion, cut where a model that is asked begins to write."""
    prompt = context.ids(tokenizer, row["prompt"])
    text = f"{context.render(tokenizer, row['prompt'])}{row['completion']}"
    whole: list[int] = tokenizer(text, add_special_tokens=not context.chat).input_ids
    if whole[: len(prompt)] != prompt:
        whole = [*prompt, *tokenizer(row["completion"], add_special_tokens=False).input_ids]
    if len(whole) == len(prompt):
        raise DataError(f"Row {number} has no completion: {dict(row)!r:.80}. Leave it out.")
    return prompt, whole[len(prompt) :]


def _fed(part: Part) -> list[int]:
    """What a model reads: all but the last token, which nothing follows."""
    return [*part[0], *part[1][:-1]]


def _forced(model: nn.Module, parts: Sequence[Part], read: Any, **options: Any) -> Tensor:
    """Feed completions, and read off the logits of their tokens; see :func:`read_logits`."""
    lengths: dict[str, Any] = {
        "keep": [len(completion) for _, completion in parts],
        "prompt_lengths": [len(prompt) for prompt, _ in parts],
    }
    return read_logits(model, [_fed(part) for part in parts], read, **lengths, **options)


def _likeliest(model: nn.Module, parts: Sequence[Part], token_budget: int) -> Tensor:
    """The likeliest token of each place of a completion and its probability, ``[rows, longest, 2]``, ends aligned."""
    width = max(len(completion) for _, completion in parts)

    def read(logits: Tensor, numbers: list[int]) -> Tensor:
        prob, token = logits.softmax(-1).max(-1)
        told = torch.stack([token.to(prob.dtype), prob], 2)
        return torch.nn.functional.pad(told, (0, 0, width - told.shape[1], 0))

    return _forced(model, parts, read, token_budget=token_budget)


def _is_digits(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return str(tokenizer.decode([token])).strip().isdecimal()
