"""Studies of rewrite-based effects on disk: the numbers of a study, and its texts for a later phase of a run."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from lightning_interp.core.storage.files import atomic_write_bytes, atomic_write_json
from lightning_interp.core.storage.jsonl import json_object, write_json_lines
from lightning_interp.core.storage.row_files import file_rows
from lightning_interp.errors import DataError
from lightning_interp.rate.estimators.triples import STAGES, RewriteTriples, as_reward
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
    content = {
        **study.metrics(),
        "units": study.result.to_dict()["units"],
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
    """Write complete units, so that a later phase of a run, or another program, has them as they were.

    Args:
        folder: Where.
        triples: The units.
        name: The file's name. Without an ending, or with ``.json``, the file keeps everything; ``.jsonl``, ``.csv``
            and ``.parquet`` hold a row a unit and draw (:meth:`RewriteTriples.rows`), without what was left out.

    Returns:
        The file.
    """
    path = Path(folder) / name
    if path.suffix == ".jsonl":
        rows = ({key: None if value != value else value for key, value in row.items()} for row in triples.rows())
        return write_json_lines(path, rows)  # no reward: null
    if path.suffix in (".csv", ".parquet"):
        try:
            frame = triples.to_frame()
            data = frame.to_csv(index=False).encode() if path.suffix == ".csv" else frame.to_parquet(index=False)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path} cannot hold a text with half of a character (a lone surrogate). Leave its unit out, or write "
                ".jsonl or .json."
            ) from error
        atomic_write_bytes(path, data)
        return path
    file = path if path.suffix == ".json" else path.with_name(f"{name}.json")
    plain = {key: value for key, value in asdict(triples).items() if key != "reward" or value is not None}
    return atomic_write_json(file, plain, nan_as_null=True)


def read_triples(path: str | os.PathLike[str]) -> RewriteTriples:
    """Read what :func:`write_triples` wrote, or a table of such rows from elsewhere.

    Args:
        path: The file: ``.jsonl``, ``.csv``, ``.parquet``, or JSON.

    Returns:
        The units.

    Raises:
        DataError: If the file cannot be read, or holds no complete units.

    Example:
        >>> import tempfile
        >>> row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
        >>> triples = RewriteTriples.from_rows([row])
        >>> read_triples(write_triples(tempfile.mkdtemp(), triples, name="a.parquet")) == triples
        True
    """
    file = Path(path)
    try:
        if file.suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
            numbers = ("w", "draw", *(f"reward_{stage}" for stage in STAGES))
            rows = [row for _, row in file_rows(file, numbers=numbers)]
            if file.suffix in (".csv", ".tsv"):  # an empty cell is a text here
                rows = [dict.fromkeys(set(STAGES) & set[str]().union(*rows), "") | row for row in rows]
            return RewriteTriples.from_rows(rows, source=str(file))
        plain = json_object(file.read_bytes(), str(file), own=True)
        if plain.get("reward"):
            plain["reward"] = {stage: [as_reward(value) for value in row] for stage, row in plain["reward"].items()}
        return RewriteTriples(**plain)
    except DataError:
        raise
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} holds no complete units: {error}. Give a file of write_triples.") from error
