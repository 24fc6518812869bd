"""Folders of safetensors: what is in them costs no reading, and a walk holds one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.errors import DataError

__all__ = ["TensorFolder", "TensorHeader", "check_depth"]

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")
_DEEPEST = 10_000

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorHeader(NamedTuple):
    """What a file says of a tensor; ``dtype`` is None for one that torch has no name for."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class TensorFolder:
    """The safetensors of a folder, one file or shards with an index: ``files`` holds the file of each tensor."""

    def __init__(self, folder: str | os.PathLike[str], *, stem: str = "model") -> None:
        self.folder = Path(folder)
        single = self.folder / f"{stem}.safetensors"
        index = self.folder / f"{stem}.safetensors.index.json"
        if single.exists():
            with _opened(single) as file:
                self.files = dict.fromkeys(file.offset_keys(), single)
        elif index.exists():
            self.files = _weight_map(index)
        else:
            here = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
            raise DataError(
                f"{self.folder} has no {single.name}; it holds {', '.join(here[:12]) or 'nothing'}. Pickled weights "
                "(.bin, .pt) are not read: load the model where it is trusted and save it again with save_pretrained."
            )

    @property
    def shards(self) -> list[Path]:
        """The files, each once, in the order of their names."""
        return sorted(set(self.files.values()))

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Shape and type of each tensor, in the order in which they lie in the files."""
        found: dict[str, TensorHeader] = {}
        for shard in self.shards:
            with _opened(shard) as file:
                for name in self._inside(shard, file):
                    part = file.get_slice(name)
                    found[name] = TensorHeader(tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
        return found

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied tensors that are stored once: other name to stored name, as the files' own notes say."""
        found: dict[str, str] = {}
        for shard in self.shards:
            with _opened(shard) as file:
                found |= {name: kept for name, kept in (file.metadata() or {}).items() if kept in self.files}
        return found

    def check(self) -> None:
        """Refuse a folder whose shards are missing, incomplete or damaged; only headers are read."""
        _ = self.headers

    def __contains__(self, name: object) -> bool:
        return name in self.files or name in self.aliases

    def tensor(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read one tensor, by its name or an alias."""
        stored = name if name in self.files else self.aliases.get(name, name)
        if stored not in self.files:
            raise DataError(f"{self.folder} has no tensor {name!r} among its {len(self.files)}.")
        with _opened(self.files[stored], device) as file:
            found: torch.Tensor = file.get_tensor(stored)
            return found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stored tensor with its name, shard by shard as they lie in the files."""
        for shard in self.shards:
            with _opened(shard) as file:
                for name in self._inside(shard, file):
                    yield name, file.get_tensor(name)

    def _inside(self, shard: Path, file: Any) -> list[str]:
        names = [name for name in file.offset_keys() if self.files.get(name) == shard]
        lost = {name for name, where in self.files.items() if where == shard}.difference(names)
        if lost:
            raise DataError(f"{shard} lacks the tensor {min(lost)!r}, which the index puts there. Copy it again.")
        return names


def check_depth(folder: Path) -> None:
    """Refuse a model folder of no layers, or of so many that building them would never end."""
    try:
        waiting = [parse_json((folder / "config.json").read_bytes(), twice=True)]
    except (OSError, ValueError):  # who reads all of it says so
        return
    while waiting:
        config = waiting.pop()
        if not isinstance(config, dict):
            continue
        waiting += config.values()
        for key in set(_DEPTHS).intersection(config):
            depth = config[key]
            if isinstance(depth, int | float) and not 1 <= depth <= _DEEPEST:
                raise DataError(
                    f"{folder / 'config.json'} says {key}={depth!r:.40}; expected 1 to {_DEEPEST} layers. Copy or "
                    "download the model again."
                )


@contextmanager
def _opened(path: Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    if not path.exists():
        raise DataError(f"{path.parent} lacks the shard {path.name!r}, which its index names. Copy the folder again.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is damaged or cut short ({_first_line(error)}; {path.stat().st_size} bytes on disk). "
            "Copy or download it again."
        ) from error


def _weight_map(index: Path) -> dict[str, Path]:
    try:
        mapping = parse_json(index.read_bytes(), twice=True)["weight_map"]
        files = {str(name): str(file) for name, file in mapping.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index} is no index of safetensors shards ({_first_line(error)}). Copy it again.") from error
    for file in files.values():
        if Path(file).name != file:
            raise DataError(f"{index} names the shard {file!r}, which lies outside its folder. Copy it again.")
    return {name: index.parent / file for name, file in files.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
