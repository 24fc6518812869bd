"""Studies of rewrite-based effects on disk: the numbers of a study, and its texts for a later phase of a run."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from lightning_interp.core.storage.files import atomic_write_json
from lightning_interp.core.storage.jsonl import json_object
from lightning_interp.errors import DataError
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.report.study import EffectStudy

__all__ = ["read_triples", "write_effects", "write_triples"]


def write_effects(folder: str | os.PathLike[str], study: EffectStudy, *, name: str = "effects", seed: int = 0) -> Path:
    """Write a study to ``<name>.json``: every number, the contrast of each unit, versions and seed.

    Args:
        folder: Where.
        study: The study.
        name: The file's name, without its ending.
        seed: The seed that the rewrites and checks were made with.

    Returns:
        The file.

    Raises:
        ManifestError: If it cannot be written.
    """
    versions = {package: _version(package) for package in ("lightning-interp", "torch", "numpy", "scipy")}
    versions["python"] = platform.python_version()
    units = {"units": study.result.to_dict()["units"]}
    content = {
        **study.metrics(),
        **units,
        "left_out_ids": study.triples.dropped_ids,
        "seed": seed,
        "versions": versions,
    }
    return atomic_write_json(Path(folder) / f"{name}.json", content, nan_as_null=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_triples(folder: str | os.PathLike[str], triples: RewriteTriples, *, name: str = "triples") -> Path:
    """Write complete units to ``<name>.json``, so that a later phase of a run has them as they were.

    Args:
        folder: Where.
        triples: The units.
        name: The file's name, without its ending.

    Returns:
        The file.
    """
    return atomic_write_json(Path(folder) / f"{name}.json", asdict(triples))


def read_triples(path: str | os.PathLike[str]) -> RewriteTriples:
    """Read what :func:`write_triples` wrote.

    Args:
        path: The file.

    Returns:
        The units.

    Raises:
        DataError: If the file is no such one.

    Example:
        >>> import tempfile
        >>> triples = RewriteTriples(attr="long", ids=["a"], w=[1], prompts=[""], original=["oh!"], rewrite=["oh"],
        ...     rewrite2=["oh!"], draw=[0])
        >>> read_triples(write_triples(tempfile.mkdtemp(), triples)) == triples
        True
    """
    try:
        return RewriteTriples(**json_object(Path(path).read_bytes(), os.fspath(path)))
    except (OSError, TypeError) as error:
        raise DataError(f"{os.fspath(path)} holds no complete units: {error}. Give a file of write_triples.") from error
