"""Frequencies of English words, read from an installed package and never stored here."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from lightning_interp.errors import DataError, RecipeError

__all__ = ["word_counts"]


def word_counts(path: str | os.PathLike[str] | None = None) -> dict[str, int]:
    r"""Read how often each word occurs in a collection of English texts.

    Args:
        path: A file with a word and its count a line; lines that begin with ``;`` are remarks. None takes the 29,000
            words that come with the package ``textblob``, which is not imported for that.

    Returns:
        Counts by word, in lower case.

    Raises:
        RecipeError: If no path is given and ``textblob`` is not installed.
        DataError: If the file cannot be read or a line is no word and count; names file and line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "counts.txt"
        >>> _ = file.write_text("; two words\nfilm 90\ngreat 50\n")
        >>> word_counts(file)
        {'film': 90, 'great': 50}
    """
    file = _of_textblob() if path is None else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read: {error}. Give a text file with a word and its count a line."
        ) from error
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(";"):
            continue
        word, _, count = line.rpartition(" ")
        if not word or not count.isdecimal():
            raise DataError(f"{file}, line {number}: {line!r:.80}; expected a word, a space and a count.")
        counts[word.lower()] = counts.get(word.lower(), 0) + int(count)
    return counts


def _of_textblob() -> Path:
    spec = find_spec("textblob")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            "Word counts are read from the package textblob, which is not installed. Install it with "
            "`pip install --no-deps textblob`, or give a file: word_counts(path)."
        )
    return Path(spec.submodule_search_locations[0]) / "en" / "en-spelling.txt"
