"""What is given one a prompt, for a pass in which each prompt may have several rows: beams or samples."""

from __future__ import annotations

from typing import Any

import torch

from lightning_interp.core.tokens.generation import repeat_rows
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError

__all__ = ["given_mask", "rows_each"]


def rows_each(step: StepContext, count: int, what: str) -> int:
    """Rows of a pass that each of ``count`` values serves: one, or all beams (samples) of one prompt.

    Where there are fewer values than rows, ``generate`` tells how many prompts it was given, or else the pass that
    reads the prompts whether its rows are repeated; other rows are refused, whose values nobody has given.

    Raises:
        PositionError: If each value cannot serve rows of one and the same prompt.
    """
    if count == step.batch_size or count == 1:
        return step.batch_size // count
    key = (rows_each, count)
    if key not in step.cache:
        prompts = None if step.generation is None else step.generation.prompts
        fits = _repeated(step.prompt or step, step.batch_size, count) if prompts is None else prompts == count
        step.cache[key] = step.batch_size % count == 0 and fits
    if not step.cache[key]:
        raise PositionError(
            f"{what}: {count} for a pass of {step.batch_size} rows, which are not {count} prompts with the same number "
            "of beams or samples each. Give one for each row."
        )
    return step.batch_size // count


def _repeated(prompt: StepContext, rows: int, count: int) -> bool:
    """Whether the rows that read the prompts are the same tokens ``rows / count`` times over, one after the other."""
    if prompt.input_ids is None or prompt.batch_size != rows or rows % count:
        return False
    known = prompt.known_prompt_lengths
    asked = prompt.valid if known is None else prompt.valid & (prompt.positions < prompt.prompt_lengths[:, None])
    for tokens in (prompt.input_ids.where(asked, 0), asked):
        each = tokens.reshape(count, rows // count, -1)
        if not bool((each == each[:, :1]).all()):
            return False
    return True


def given_mask(step: StepContext, given: Any, what: str) -> torch.Tensor:
    """A mask ``[B, T]`` that a user gave for the rows of a pass; within ``generate`` one row a prompt is enough.

    It covers the prompt, or the sequence as far as it is read: of a part nobody knows where it lies.
    """
    rows = len(given) if isinstance(given, torch.Tensor) and given.dim() == 2 else None
    if rows is not None and step.generation is not None and rows == step.generation.prompts:
        given, rows = repeat_rows(given, step.batch_size), step.batch_size
    if rows != step.batch_size:
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise PositionError(
            f"{what} is {shape}; expected a tensor [B, T] with B={step.batch_size}. Put a row for each row of the pass "
            "into it."
        )
    mask: torch.Tensor = given
    _check_width(step, mask.shape[1], what)
    return mask


def _check_width(step: StepContext, width: int, what: str) -> None:
    told, read = step.generation, step.past - step.virtual + step.length
    if told is not None and not told.doubt:
        step.check_text()
        fits, columns = width == told.columns, told.columns
    elif step.past <= step.virtual:
        fits, columns = width == read, read
    else:
        known = None if step.prompt is None else step.prompt.past - step.prompt.virtual + step.prompt.length
        fits, columns = width >= read or (not step.unseen and known in (None, width)), known or read
    if not fits:
        cached = f", {step.unseen} of them cached before attaching" if step.unseen else ""
        raise PositionError(
            f"{what} covers {width} columns, but the prompt has {columns}{cached}. Put a mask of all of its columns "
            "into the batch."
        )
