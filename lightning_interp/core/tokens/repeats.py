"""Values that are given one a prompt, for a pass in which each prompt may have several rows: beams or samples."""

from __future__ import annotations

from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError

__all__ = ["rows_each"]


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
