"""Standard output that is closed, full, left by its reader, or without some letters: what is worked on goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

__all__ = ["LastingStream", "lasting_output"]


class LastingStream:
    """A stream that swallows what comes after its first failure, which is kept as ``error``.

    Letters that its encoding lacks are written as escapes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write a text, as far as it can be written."""
        if self.error is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self.error is None and not self._stream.closed and bool(self._stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Let neither standard output nor standard error stop what is done in this block."""
    _open_standard_files()
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            for stream in (out, err):
                if stream.error is not None:
                    _silence(stream._stream)


def _open_standard_files() -> None:
    """Give closed standard files to the null device: the next file that is opened would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _silence(stream: Any) -> None:
    """Let the interpreter's last flush of this process's own output succeed."""
    if stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
