"""Kills runs of a recipe at chosen moments and looks whether they go on to the same bytes; a program of its own.

``python killer.py RECIPE FOLDER SEED KILLS`` imports everything once and forks a process for each run. A reference run
counts the file operations of each phase (and between phases); each kill is aimed at one of them, at once or some
milliseconds later. Afterwards checkpoints may be cut at a random byte. Prints what happened as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
from collections import Counter
from pathlib import Path

UNSTABLE = ("manifest.json", ".lock", "report.html", "config.yaml")  # times, paths and process ids
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
STARVED = (2, 5.5)  # between which powers of ten the bytes lie that a file may have
MOST_STARTS = 4


class Moments:
    """Counts the file operations below a folder by phase, and ends the process at one of them."""

    def __init__(self, folder: Path, aim: tuple[str, int, float] | None = None) -> None:
        self.folder, self.aim = str(folder.resolve()), aim
        self.phase, self.counts = "before", Counter()

    def install(self) -> None:
        from lightning_interp.core.storage.manifest import RunManifest

        inner = RunManifest._run

        def run(manifest, name, fn, token):
            self.phase = name
            try:
                return inner(manifest, name, fn, token)
            finally:
                self.phase = f"after {name}"

        RunManifest._run = run
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple) -> None:
        if event == "open":
            touched = isinstance(args[2], int) and bool(args[2] & WRITES)
        else:
            touched = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        places = [os.path.abspath(place) for place in args[:2] if isinstance(place, str | os.PathLike)]
        if not touched or not any(place.startswith(self.folder) for place in places):
            return  # of a rename the target counts too: checkpoints are moved into the folder
        number = self.counts[self.phase]
        self.counts[self.phase] += 1
        if self.aim is not None and self.aim[:2] == (self.phase, number):
            if self.aim[2]:
                signal.setitimer(signal.ITIMER_REAL, self.aim[2])  # no handler: the process dies at once
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def run(
    recipe: str, folder: Path, log: Path, *, aim: tuple[str, int, float] | None = None, size: int = 0
) -> tuple[int, dict]:
    """Run the command in a process of its own; its exit code (minus a signal) and how many operations were counted."""
    told = log.with_suffix(".json")
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 99  # an error that is none of ours
        try:
            from lightning_interp.cli import main
            from lightning_interp.running import results

            results.png = lambda _: b"\x89PNG\r\n\x1a\n"  # half the time of a small run goes into drawing its figures
            moments = Moments(folder, aim)
            moments.install()
            if size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            code = main(["run", recipe, "--smoke=true", f"--run_dir={folder}"])
            if not size:
                told.write_text(json.dumps(moments.counts))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, {} if code else json.loads(told.read_text())  # a kill may hit the counts themselves


def content(folder: Path) -> dict[str, str]:
    """The digest of each file that a run leaves, but for times and checkpoints."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.name not in UNSTABLE and path.suffix != ".ckpt" and name.parts[0] != "tensorboard":
            data = (
                re.sub(rb'"t": "[^"]*"', b"", path.read_bytes()) if path.name == "rewrites.jsonl" else path.read_bytes()
            )
            found[name.as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def cut_checkpoints(folder: Path, draws: random.Random) -> int:
    """Cut some of the checkpoints that a kill has left at a random byte."""
    cut = 0
    for path in sorted(folder.rglob("*.ckpt")):
        if draws.random() < 0.7:
            os.truncate(path, draws.randrange(path.stat().st_size + 1))
            cut += 1
    return cut


def gone_on(recipe: str, folder: Path, log: Path, wanted: dict[str, str]) -> str:
    """Start the same command until it is done; what is wrong with the result, or nothing."""
    code = 0
    for _ in range(MOST_STARTS):
        code, _ = run(recipe, folder, log)
        if code == 0:
            break
    if code:
        return f"stuck with code {code}: {log.read_text()[-1500:]}"
    found = content(folder)
    other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    return f"other bytes: {other[:6]}" if other else ""


def main() -> None:
    recipe, folder, seed, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    import lightning  # noqa: F401 - once, before the forks
    import matplotlib.pyplot  # noqa: F401
    import transformers  # noqa: F401

    import lightning_interp.grafting
    import lightning_interp.models
    import lightning_interp.rate
    import lightning_interp.steering  # noqa: F401

    draws, log = random.Random(f"{seed} {recipe}"), folder / "log.txt"  # noqa: S311 - no secrets
    code, counts = run(recipe, folder / "whole", log)
    assert code == 0, log.read_text()
    wanted, done, wrong = content(folder / "whole"), [], []
    aims = [
        (phase, number, draws.choice((0.0, draws.uniform(0.0, 0.05))))
        for phase, count in counts.items()
        for number in sorted(draws.sample(range(count), min(count, kills)))
    ]
    for number, aim in enumerate(aims):
        place = folder / f"kill{number}"
        code, _ = run(recipe, place, log, aim=aim)
        cut = cut_checkpoints(place, draws) if place.exists() else 0
        fault = (
            gone_on(recipe, place, log, wanted)
            if code in (0, -signal.SIGKILL, -signal.SIGALRM)
            else log.read_text()[-1500:]
        )
        done.append({"aim": aim, "killed": code < 0, "cut": cut})
        wrong += [{"aim": aim, "cut": cut, "fault": fault}] if fault else []
    for size in [int(10 ** draws.uniform(*STARVED)) for _ in range(2 * kills)]:
        place = folder / f"starved{size}"
        code, _ = run(recipe, place, log, size=size)
        fault = gone_on(recipe, place, log, wanted) if code in (0, 1) else f"code {code}: {log.read_text()[-1500:]}"
        done.append({"aim": size, "killed": False, "cut": 0})
        wrong += [{"aim": size, "fault": fault}] if fault else []
    print(json.dumps({"phases": counts, "done": done, "wrong": wrong}))


if __name__ == "__main__":
    main()
