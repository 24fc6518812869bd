"""Standard output that fails: what is worked on goes on, and the exit code tells the truth."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_interp.cli import main
from lightning_interp.running import output
from lightning_interp.running.output import LastingStream, lasting_output

ROOT = Path(__file__).parents[2]


class Broken(io.StringIO):
    """Fails from the n-th write on."""

    def __init__(self, error, after=0):
        super().__init__()
        self.failure, self.left = error, after

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.failure
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(28, "No space left on device"),
        ValueError("I/O operation on closed file"),
    ],
)
def test_the_first_failure_is_kept_and_the_rest_swallowed(error):
    stream = Broken(error, after=1)
    lasting = LastingStream(stream)
    for text in ("a", "b", "c"):
        assert lasting.write(text) == 1
    lasting.flush()
    assert (stream.getvalue(), lasting.error) == ("a", error)
    assert not lasting.isatty()


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", r"Zo\xeb \U0001f389 \udcc3"), ("latin-1", r"Zoë \U0001f389 \udcc3"), ("utf-8", r"Zoë 🎉 \udcc3")],
)
def test_letters_that_the_encoding_lacks_are_escapes(encoding, written):
    raw = io.BytesIO()
    lasting = LastingStream(io.TextIOWrapper(raw, encoding=encoding))
    lasting.write("Zoë 🎉 \udcc3")
    lasting.flush()
    assert raw.getvalue().decode(encoding) == written
    assert lasting.error is None


def test_other_things_are_asked_of_the_stream_itself(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream := Broken(OSError(28, "full")))
    with lasting_output() as out:
        print("lost")
        assert out.getvalue() == ""
        assert sys.stdout is out
    assert sys.stdout is stream
    assert out.error.errno == 28


class TestTheCommand:
    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (BrokenPipeError(32, "Broken pipe"), 0, ""),
            (
                OSError(28, "No space left on device"),
                1,
                "all is done, but standard output cannot be written: .*No space",
            ),
        ],
    )
    @pytest.mark.parametrize("argv", [["list"], []])
    def test_a_finished_command_says_whether_it_could_be_read(self, error, code, said, argv, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdout", Broken(error))
        assert main(argv) == code
        err = capsys.readouterr().err
        assert __import__("re").search(said, err) if said else err == ""

    def test_a_pipe_that_breaks_elsewhere_is_no_success(self, monkeypatch):
        def breaks(parsed):
            raise BrokenPipeError

        monkeypatch.setattr("lightning_interp.cli._list", breaks)
        with pytest.raises(BrokenPipeError):
            main(["list"])

    def test_alone_it_prints_its_help(self, capsys):
        assert main([]) == 0
        assert "lightning-interp run grafting/facts" in capsys.readouterr().out

    def test_an_argument_that_is_no_text_is_refused_with_the_remedy(self, capsys):
        assert main(["run", "grafting/facts", "--run_dir=\udcc3\udcb6"]) == 2
        assert r"'--run_dir=\udcc3\udcb6' holds bytes that are no letters of this locale" in (
            err := capsys.readouterr().err
        )
        assert "set PYTHONUTF8=1" in err


def shell(line, **environment):
    """Run a line of shell with the command in $LI; nothing here imports torch."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "LI": f"{sys.executable} -m lightning_interp", **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, env=variables, errors="replace"
    )


SHELL = {
    "a reader that leaves": ("$LI list | head -0", 0, ""),
    "a full disk": ("$LI list > /dev/full", 1, "standard output cannot be written: .*No space left"),
    "help on a full disk": ("$LI --help > /dev/full", 0, ""),
    "closed output": ("$LI list >&-", 0, ""),
    "closed error": ("$LI run no/such 2>&-", 2, ""),
    "all closed": ("$LI list <&- >&- 2>&-", 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELL)
def test_in_a_shell(name):
    line, code, said = SHELL[name]
    done = shell(line)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert __import__("re").search(said, done.stderr) if said else not done.stderr


@pytest.mark.slow
def test_in_a_locale_of_ascii(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    settings = tmp_path / "mine.yaml"
    settings.write_text("recipe: rate/typos\nrun_dir: zoë\nsmoke: true\n", encoding="utf-8")
    for line in (f"$LI run {settings}", "$LI run rate/typos --smoke=true --run_dir=zoë", "$LI show zoë"):
        done = shell(f"cd {tmp_path} && {line}", **ascii_only)
        assert done.returncode in (1, 2)
        assert "PYTHONUTF8=1" in done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_closed_standard_files_are_given_to_the_null_device(monkeypatch):
    opened, closed = [], {0, 2}

    def fstat(number):
        if number in closed:
            raise OSError(9, "Bad file descriptor")

    with monkeypatch.context() as patched:
        patched.setattr(output.os, "fstat", fstat)
        patched.setattr(output.os, "open", lambda path, flags: opened.append(path))
        patched.setattr(output, "open", lambda *args, **options: SimpleNamespace(name=args[0]), raising=False)
        patched.setattr(sys, "stderr", None)
        output._open_standard_files()
        named = sys.stderr.name
    assert opened == [os.devnull] * 2
    assert named == os.devnull
