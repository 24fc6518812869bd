"""CPU seconds by test file: measured in every run, held to `budgets.json`, and written there by `make budgets`.

CPU seconds, children's too, do not grow when other processes wait for the same core. They do grow where a core is
slower or shares its caches: so a yardstick is timed all along and stretches the budgets, and a file that took too much
is measured once more, alone, before it turns a run red.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("budgets.json")
# A file may take this many times its budget, and this many seconds on top.
FACTOR, FLOOR = 1.5, 1.0
# The budget of a file that is not listed, unless the file of budgets says otherwise.
OTHERS = 5.0
# Which tests run when nothing else is said (pyproject.toml).
DEFAULT = "not slow and not gpu"
_YARDSTICK_EVERY = 5.0
_shared: Counter[str] = Counter()


def used() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@contextmanager
def apart(name: str) -> Iterator[None]:
    """Book what runs here under a name of its own: the file that happens to need it first is not to blame."""
    before = used(), sum(_shared.values())
    try:
        yield
    finally:
        _shared[name] += used() - before[0] - (sum(_shared.values()) - before[1])


def yardstick() -> float:
    """CPU seconds of a fixed piece of work, half Python and half torch, as tests are."""
    import torch

    matrix, words = torch.ones(32, 32), {}
    before = time.process_time()
    for index in range(300):
        (matrix @ matrix).sum().item()
        for letter in range(60):
            words[f"{index}{letter}"] = letter
    return time.process_time() - before


def over(taken: dict[str, float], budgets: dict[str, Any], scale: float) -> dict[str, str]:
    """What to say of each file that took more than it may."""
    said = {}
    for name, seconds in sorted(taken.items()):
        budget = budgets["files"].get(name, budgets["others"])
        if seconds > (limit := (FACTOR * budget + FLOOR) * scale):
            why = f"{FACTOR:g} x {budget:.1f} + {FLOOR:g}, on a machine that is {scale:.2f} times as slow"
            said[name] = f"{name}: {seconds:.1f} CPU seconds, at most {limit:.1f} ({why})"
    return said


def alone(names: Iterable[str], root: Path) -> dict[str, float]:
    """The CPU seconds of test files that run alone, in one more process; of what is no file, none."""
    files = [name for name in names if (root / name).is_file()]
    if not files:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "cpu.json")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--budgets=off", f"--cpu-file={out}", *files]
        subprocess.run(command, cwd=root, check=False, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


class Budget:
    """Measures each test in the process that runs it; adds up, compares and writes in the one that was started."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker = hasattr(config, "workerinput")
        self.taken: Counter[str] = Counter()
        self.collection: list[float] = []
        self.sticks: list[float] = []
        self.last_stick = float("-inf")
        self.too_slow: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.config.option.budgets != "off" and used() - self.last_stick > _YARDSTICK_EVERY:
            self.sticks.append(yardstick())
            self.last_stick = used()
        self.began, self.shared = used(), sum(_shared.values())
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            seconds = used() - self.began - (sum(_shared.values()) - self.shared)
            report.user_properties.append(("cpu", seconds))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == "cpu":
                self.taken[report.nodeid.partition("::")[0]] += value

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files that take long begin first where there are several processes, so that all end together."""
        if self.worker and FILE.exists():
            files = json.loads(FILE.read_text(encoding="utf-8"))["files"]
            items.sort(key=lambda item: -files.get(item.nodeid.partition("::")[0], 0))

    def pytest_collection_finish(self) -> None:
        self.collection.append(used())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker:
            said = {"shared": dict(_shared), "collection": self.collection, "sticks": self.sticks}
            self.config.workeroutput["budget"] = said
            return
        self.taken.update(_shared)
        if self.config.option.cpu_file:
            Path(self.config.option.cpu_file).write_text(json.dumps(self.taken), encoding="utf-8")
        self.too_slow = self.judged(again=session.exitstatus == pytest.ExitCode.OK)
        if self.too_slow and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        said = getattr(node, "workeroutput", {}).get("budget", {"shared": {}, "collection": [], "sticks": []})
        self.taken.update(said["shared"])
        self.collection += said["collection"]
        self.sticks += said["sticks"]

    def judged(self, again: bool) -> dict[str, str]:
        """The files over their budget, measured again or not; a run that was asked for slow tests has no budget."""
        option = self.config.option
        if option.budgets != "check" or option.markexpr not in ("", DEFAULT) or not (FILE.exists() and self.sticks):
            return {}
        budgets = json.loads(FILE.read_text(encoding="utf-8"))
        scale = max(1.0, statistics.median(self.sticks) / budgets["yardstick"])
        first = over(self.taken, budgets, scale)
        return over(alone(first, self.config.rootpath), budgets, scale) if first and again else first

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.config.option.cpu:
            total = sum(self.taken.values()) + sum(self.collection)
            terminalreporter.section(f"CPU seconds: {total:.1f}")
            terminalreporter.line(f"{sum(self.collection):8.1f}  collection")
            for name, seconds in self.taken.most_common(self.config.option.cpu):
                terminalreporter.line(f"{seconds:8.1f}  {name}")
        if self.config.option.budgets == "write":
            self.write()
        elif self.too_slow:
            terminalreporter.section("over the budget of CPU seconds", red=True)
            terminalreporter.line("Make these faster, or say with `make budgets` that they may take so long:")
            for line in self.too_slow.values():
                terminalreporter.line(line)

    def write(self) -> None:
        """Write what this run took as the new budgets; those of files that did not run stay."""
        before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"others": OTHERS, "files": {}}
        files = before["files"] | {name: round(seconds, 1) for name, seconds in self.taken.items()}
        kept = {name: files[name] for name in sorted(files) if files[name] > before["others"]}
        stick = round(statistics.median(self.sticks), 5)
        budgets = {"yardstick": stick, "others": before["others"], "files": kept}
        FILE.write_text(json.dumps(budgets, indent=1) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("budget")
    group.addoption("--cpu", type=int, default=0, metavar="N", help="show the N files that took most CPU seconds")
    group.addoption("--cpu-file", metavar="PATH", help="write the CPU seconds of each file there, as JSON")
    group.addoption(
        "--budgets", choices=["check", "write", "off"], default="check", help="what to do with tests/budgets.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(config))
