"""Control vectors in GGUF files, in the layout that llama.cpp and repeng read and write.

``general.architecture`` is ``controlvector``; the tensor ``direction.N``, float32 and one-dimensional, is added to the
output of block ``N``, counted from 0. llama.cpp starts at ``N = 1``: the output of the first block has no place in such
a file. ``controlvector.model_hint`` names the model's family, ``controlvector.layer_count`` the number of directions.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.files import atomic_write_bytes, jsonable
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.errors import DataError, InterpError, SiteError
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = ["load_control_vector", "save_control_vector"]

_ARCHITECTURE = "controlvector"
_HINT, _COUNT = f"{_ARCHITECTURE}.model_hint", f"{_ARCHITECTURE}.layer_count"
_ABOUT = "lightning_interp.about"  # more than the layout asks for; other programs pass over it
_KEPT = ("concept", "method", "model", "fingerprint", "n", "positions")
_NAME = re.compile(r"direction\.(\d+)")


def save_control_vector(vector: SteeringVector, path: str | os.PathLike[str], *, model_hint: str | None = None) -> Path:
    """Write a vector for llama.cpp (``--control-vector``) and repeng.

    Args:
        vector: Directions at ``resid_post`` of layers from 1 on.
        path: The file; it appears whole or not at all.
        model_hint: Family of the model as llama.cpp names it; default is the vector's ``model_type``.

    Returns:
        ``path``.

    Raises:
        SiteError: If the layout has no place for one of the sites.
        ManifestError: If the file cannot be written.

    Example:
        >>> vector = SteeringVector({"resid_post.3": [1.0, 2.0]}, model_type="llama")
        >>> load_control_vector(save_control_vector(vector, Path(tempfile.mkdtemp()) / "v.gguf")).only().tolist()
        [1.0, 2.0]
    """
    from gguf import GGUFWriter

    for site in vector.sites:
        if site.kind != "resid_post" or site.layer is None or site.layer < 1:
            raise SiteError(
                f"A control-vector file has no place for {site} of {vector!r}: it holds what is added to the output of "
                "blocks from 1 on ('resid_post.1', 'resid_post.2', ...). Use vector.select([...]), or save safetensors."
            )
    about = {name: getattr(vector, name) for name in _KEPT}
    about["scale"] = {str(site): value for site, value in vector.scale.items()}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "vector.gguf"
        writer = GGUFWriter(written, _ARCHITECTURE)
        writer.add_string(_HINT, vector.model_type if model_hint is None else model_hint)
        writer.add_uint32(_COUNT, len(vector.sites))
        writer.add_string(_ABOUT, json.dumps(jsonable(about)))
        for site in sorted(vector.sites):
            values = vector.directions[site].detach().to("cpu", torch.float32).contiguous().numpy()
            writer.add_tensor(f"direction.{site.layer}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return atomic_write_bytes(path, written.read_bytes())


def load_control_vector(path: str | os.PathLike[str]) -> SteeringVector:
    """Read a control-vector file of llama.cpp, repeng or this package.

    A layer whose direction is zero is one that is not steered, and is left out.

    Args:
        path: The ``.gguf`` file.

    Returns:
        The vector, at ``resid_post``.

    Raises:
        DataError: If the file is missing or damaged, or is no control vector.
    """
    reader = _read(Path(path))
    directions: dict[Site, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _NAME.fullmatch(tensor.name)
        values = _numbers(tensor, path) if name else None
        if name and values is not None and values.any():
            directions[Site("resid_post", int(name[1]))] = torch.from_numpy(values)
    if not directions:
        found = ", ".join(tensor.name for tensor in reader.tensors[:4]) or "none"
        raise DataError(
            f"{str(path)!r} holds no direction that is not zero; its tensors are: {found}. Expected direction.1, "
            "direction.2, ... of a control vector."
        )
    about = _text(reader, _ABOUT)
    try:
        vector = SteeringVector(directions, model_type=_text(reader, _HINT) or "", concept=Path(path).stem)
        return vector if about is None else replace(vector, **parse_json(about))
    except (ValueError, TypeError, InterpError) as error:
        raise DataError(f"{str(path)!r} is damaged: {error} Export the control vector again.") from error


def _read(path: Path) -> Any:
    from lightning_interp.models.sources.gguf_files import read_gguf

    reader = read_gguf(path)
    if (architecture := _text(reader, "general.architecture")) != _ARCHITECTURE:
        raise DataError(
            f"{path} is a .gguf file of architecture {architecture!r}, expected {_ARCHITECTURE!r}. A model is loaded "
            "with load_causal_lm."
        )
    return reader


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")


def _numbers(tensor: Any, path: str | os.PathLike[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    if tensor.tensor_type.name not in ("F32", "F16") or len(tensor.shape) != 1:
        raise DataError(
            f"{str(path)!r}: {tensor.name} is {tensor.tensor_type.name} {[int(n) for n in tensor.shape]}; expected "
            "one-dimensional F32. Export the control vector again."
        )
    return np.array(tensor.data, dtype=np.float32)
