"""Tensors on disk: safetensors files whose bytes follow from their content alone, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_interp.core.storage.files import atomic_writer
from lightning_interp.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_tensors", "save_tensors"]


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file whose bytes follow from its content (``safetensors`` orders metadata at random)."""
    from safetensors.torch import save

    data = save({name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)})
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    placed = dict(sorted(entries.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0])))
    about = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    header = json.dumps({**about, **placed}, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with atomic_writer(path) as out:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        out.write(memoryview(data)[start:])
    return Path(path)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot read the tensors of {str(path)!r}: {error}. Give a whole safetensors file.") from error
