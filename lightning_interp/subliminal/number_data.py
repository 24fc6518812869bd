"""The LightningDataModule that finetunes a student on number sequences: loss on the numbers and the end alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.data.batching import RowDataset, token_batch, token_dataset
from lightning_interp.models.data.rows import Row, read_rows
from lightning_interp.models.data.text_data import TextDataModule
from lightning_interp.subliminal.traits import ChatContext

__all__ = ["NumberSequenceDataModule"]

Source = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
_DEFAULT = ChatContext()


class NumberSequenceDataModule(TextDataModule):
    """Rows of ``prompt`` and ``completion`` for :class:`CausalLM`, as a chat (or without one) in a training context.

    Every token of the context and of the prompt is labelled -100; what is scored is the completion with the end of its
    turn. A prompt has the ids that it has alone, and that what is scored reads as the completion and an end is checked
    on the first row.

    Args:
        train: A list of rows, or a file of them, such as ``rows.jsonl`` of :func:`write_numbers`.
        tokenizer: The model's tokenizer.
        context: What stands about a prompt. A missing system text and an empty one differ.
        val: Rows for validation; there is no validation if None.
        teacher_context: What stands about a prompt where a teacher reads it, for :class:`SoftStudent`: batches hold
            ``teacher_input_ids``, ``teacher_attention_mask`` and ``teacher_labels`` too. None where it is the same.
        batch_size: Rows a batch and process.
        max_length: Tokens a row may have.
        seed: Root seed of the order.
        num_workers: Processes that make batches.

    Raises:
        RecipeError: If an argument has a wrong value, or a context holds the beginning of an answer.
        DataError: If the tokenizer lacks a chat template, or prompt and completion cannot be told apart.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> rows = [{"prompt": "More, please: 4, 5.", "completion": "6, 7"}]
        >>> data = NumberSequenceDataModule(rows, tokenizer=byte_tokenizer(), context=ChatContext(system=""))
        >>> batch = next(iter(data.train_dataloader()))
        >>> byte_tokenizer().decode(batch["labels"][batch["labels"] != -100])
        '6, 7<|im_end|>'
    """

    def __init__(
        self,
        train: Source,
        *,
        tokenizer: PreTrainedTokenizerBase,
        context: ChatContext = _DEFAULT,
        val: Source | None = None,
        teacher_context: ChatContext | None = None,
        batch_size: int = 22,
        max_length: int = 500,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        for one in filter(None, (context, teacher_context)):
            if one.answer_prefix:
                raise RecipeError(
                    f"{type(self).__name__} got a context with answer_prefix={one.answer_prefix!r}: the answer is the "
                    "row's completion. Leave it empty for training."
                )
        self.context, self.teacher_context = context, teacher_context
        own = _rows(train, "train", context)
        super().__init__(
            own, tokenizer=tokenizer, val=None if val is None else _rows(val, "val", context), batch_size=batch_size,
            max_length=max_length, seed=seed, num_workers=num_workers, too_long="error",
        )  # fmt: skip
        self._seen_by_teacher = {
            split: None if teacher_context is None or source is None else _rows(source, split, teacher_context)
            for split, source in {"train": train, "val": val}.items()
        }
        self._check(own[0])
        if teacher_context is not None:
            self._batch = _two_views

    def _encode(self, split: str) -> RowDataset:
        own, seen = super()._encode(split), self._seen_by_teacher[split]
        if seen is None:
            return own
        encoded = [self._encoder.encode(Row(f"{split}[{i}]", *_form(row))) for i, row in enumerate(seen)]
        longest = max(len(row.ids) for row in encoded)
        if longest > self.max_length:
            raise DataError(
                f"{split}: the longest row has {longest} tokens in the teacher's context, more than "
                f"max_length={self.max_length}. Raise it."
            )
        teacher = token_dataset(encoded)
        pairs = [(*own[i], *teacher[i]) for i in range(len(own))]
        for number, (ids, scored, read, judged) in enumerate(pairs):
            if ids[scored].tolist() != read[judged].tolist():
                raise DataError(
                    f"{split}[{number}]: the completion has other tokens in the teacher's context than in the "
                    "student's, so nothing can be distilled token by token. Use a chat template in both or in neither."
                )
        return RowDataset(pairs, lambda row: (row[0], torch.zeros_like(row[1]), row[2], torch.zeros_like(row[3])))

    def _check(self, row: Mapping[str, Any]) -> None:
        """Refuse a template or a tokenizer with which prompt and completion cannot be told apart."""
        form, content = _form(row)
        encoded = self._encoder.encode(Row("the first row", form, content))
        completion = str(content["messages"][-1]["content"] if form == "messages" else content["completion"])
        scored = [i for i, counts in zip(encoded.ids, encoded.scored, strict=True) if counts]
        said = str(self.tokenizer.decode(scored, clean_up_tokenization_spaces=False))
        rest = said.strip().removeprefix(completion.strip())
        for token in self.tokenizer.all_special_tokens:
            rest = rest.replace(token, "")
        if not said.strip().startswith(completion.strip()) or rest.strip():
            raise DataError(
                f"What is scored of the first row reads {said!r:.80}; expected {completion!r:.60} and the end of the "
                "turn. The chat template or the tokenizer changes the completion; use another one."
            )


def _rows(source: Source, split: str, context: ChatContext) -> list[dict[str, Any]]:
    """Rows of prompt and completion as conversations in a context, or as bare text without a chat."""
    rows = read_rows(source, name=split)
    for row in rows:
        if row.form != "prompt":
            raise DataError(f"{row.where}: expected a row with 'prompt' and 'completion', as write_numbers gives.")
    pairs = [(row.content["prompt"], row.content["completion"]) for row in rows]
    if not context.chat:
        return [{"prompt": context.raw(prompt), "completion": f" {completion}"} for prompt, completion in pairs]
    answers = [{"role": "assistant", "content": completion} for _, completion in pairs]
    return [{"messages": [*context.messages(prompt), turn]} for (prompt, _), turn in zip(pairs, answers, strict=True)]


def _form(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return ("messages" if "messages" in row else "prompt"), dict(row)


def _two_views(rows: Sequence[tuple[Tensor, ...]], *, pad_id: int) -> dict[str, Tensor]:
    """A batch as the student reads it, and as the teacher does."""
    collate: Callable[..., dict[str, Tensor]] = token_batch
    own, seen = collate([row[:2] for row in rows], pad_id=pad_id), collate([row[2:] for row in rows], pad_id=pad_id)
    return own | {f"teacher_{name}": value for name, value in seen.items()}
