"""What an adapter did at each token, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_interp.core.tokens.text import token_spans
from lightning_interp.errors import PositionError

__all__ = ["AdapterTrace", "TracedModule"]


@dataclass(frozen=True)
class TracedModule:
    """A module that an adapter sits on.

    Args:
        path: Its path below the Hugging Face model.
        layer: Index of its block; None outside of blocks.
        name: Its path below the block.
        rank: Rank of the adapter there.
    """

    path: str
    layer: int | None
    name: str
    rank: int


@dataclass(frozen=True, eq=False)
class AdapterTrace:
    """What an adapter did, for ``B`` rows of ``T`` columns and ``M`` modules; NaN at padding and at what was not seen.

    Args:
        modules: The modules, in the model's order.
        norms: ``||s B A x||`` of the branch ``[B, T, M]``, float32.
        bases: Norm of the base's own output ``||W x + b||`` beside it.
        scalars: ``A x`` where the rank is 1, else NaN.
        coordinates: Coordinates of the branch along the module's first output directions ``[B, T, M, k]`` (see
            :func:`singular_directions`, which fixes their signs); NaN beyond the rank.
        positions: Index of each token among the real ones of its row ``[B, T]``; -1 at padding.
        ids: Token ids ``[B, T]``; None where the model was given embeddings.
    """

    modules: tuple[TracedModule, ...]
    norms: torch.Tensor
    bases: torch.Tensor
    scalars: torch.Tensor
    coordinates: torch.Tensor
    positions: torch.Tensor
    ids: torch.Tensor | None

    @property
    def relative(self) -> torch.Tensor:
        """The branch's norm over that of the base's output ``[B, T, M]``."""
        return self.norms / self.bases

    def table(
        self, tokenizer: Any = None, ids: torch.Tensor | None = None, *, rows: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """One row for each real token and module.

        Args:
            tokenizer: Spells the tokens; without one ``token`` is the id.
            ids: Token ids ``[B, T]``, where the model was given embeddings.
            rows: Which rows of the batch; all by default.

        Returns:
            ``row``, ``position``, ``token``, ``layer``, ``module``, ``norm``, ``relative``, ``scalar`` and
            ``coordinate_1`` and so on; None where there is no such number.
        """
        values = torch.cat([x[..., None] for x in (self.norms, self.relative, self.scalars)], dim=-1)
        numbers = torch.cat([values, self.coordinates], dim=-1).tolist()
        names = ["norm", "relative", "scalar", *(f"coordinate_{i + 1}" for i in range(self.coordinates.shape[-1]))]
        table = []
        for row in range(len(self.norms)) if rows is None else rows:
            for column, position, token in self.tokens(row, tokenizer, ids):
                for module, found in zip(self.modules, numbers[row][column], strict=True):
                    told = [None if number != number else number for number in found]
                    place = {"layer": module.layer, "module": module.name}
                    table.append(
                        {"row": row, "position": position, "token": token, **place}
                        | dict(zip(names, told, strict=True))
                    )
        return table

    def tokens(
        self, row: int, tokenizer: Any = None, ids: torch.Tensor | None = None
    ) -> Iterator[tuple[int, int, Any]]:
        """Column, position and text (or id) of every real token of a row."""
        ids = self.ids if ids is None else ids
        if ids is None or ids.shape != self.positions.shape:
            shape = "none" if ids is None else tuple(ids.shape)
            raise PositionError(
                f"The tokens of a trace of {tuple(self.positions.shape)} rows and columns are not known (ids: {shape})."
                " Pass ids of that shape."
            )
        positions, all_ids = self.positions[row].tolist(), ids[row].tolist()
        real = [(column, position) for column, position in enumerate(positions) if position >= 0]
        own = [all_ids[column] for column, _ in real]
        words: Sequence[Any] = own
        if tokenizer is not None:
            text, spans = token_spans(tokenizer, own)
            words = [text[start:end] for start, end in spans]
        for (column, position), word in zip(real, words, strict=True):
            yield column, position, word
