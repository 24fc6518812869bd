"""One thread, no network, no window, and tests that leave the process as they found it."""

from __future__ import annotations

import os

# Read once, when torch, tokenizers, huggingface_hub or matplotlib is imported: so before any of them.
os.environ.update(
    {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
)

import contextlib
import functools
import gc
import importlib.metadata
import inspect
import itertools
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from copies import copies_of
from filelock import FileLock
from hypothesis import HealthCheck, settings

from lightning_interp.testing.marks import missing_bundled

pytest_plugins = ["budget"]

torch.set_num_threads(1)

_TINY = "lightning_interp.models.sources.tiny"

# Lightning asks each installed package for callbacks whenever a Trainer is made, which takes 25 ms: asked once.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# Compiling the tests takes a process 10 s and the package half a second, so it is kept, whatever the shell says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes says how busy the machine is, nothing about the code. Every run draws other examples; the
# slow tests draw many, and tests that are only repeated under other kernels a few.
for name, examples in (("plain", 25), ("thorough", 100), ("few", 5)):
    settings.register_profile(
        name, max_examples=examples, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("plain")

# Written by pytest, by torch or Lightning when a part of them is imported, or by Lightning for the processes that
# it starts: put back, but no test's fault.
_MAY_CHANGE = {
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that need none: autograd starts a thread for each, and then no forked process may train."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of the bundled model where it is not installed; on CI that is a failure, never a silent skip."""
    reason = missing_bundled() if item.get_closest_marker("bundled") else None
    if reason and os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    elif reason:
        pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import bitsandbytes, where tests are collected, with functions that are not compiled: 3 s of torch._inductor."""
    if find_spec("bitsandbytes") is not None and not session.config.pluginmanager.has_plugin("dsession"):
        with mock.patch.object(torch, "compile", lambda function, **_: function):
            import bitsandbytes  # noqa: F401


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def _environment_of_the_module() -> Iterator[None]:
    """Put back what a fixture wider than a test wrote, such as a recipe that runs once and seeds Lightning."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


_numbers = itertools.count(os.getpid())


def _free_port() -> int:
    """A port that this test process alone gives away, below those that the system hands to whoever connects."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", 20_000 + 1_000 * worker + next(_numbers) % 1_000))
            return free.getsockname()[1]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Give the test a free port; put the environment back afterwards and fail a test that changed it."""
    os.environ["MASTER_PORT"] = str(_free_port())
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if leaked := sorted(changed - _MAY_CHANGE):
        pytest.fail(f"the test changed environment variables and left them so: {', '.join(leaked)}", pytrace=False)


def _stack(context: int = 0) -> list[inspect.FrameInfo]:
    frames = traceback.walk_stack(sys._getframe(1))
    return [inspect.FrameInfo(f, f.f_code.co_filename, line, f.f_code.co_name, None, None) for f, line in frames]


@pytest.fixture(scope="session", autouse=True)
def _stack_without_sources() -> Iterator[None]:
    """Lightning walks the stack at each load_from_checkpoint; to read the sources of all frames takes 0.3 s."""
    with mock.patch.object(inspect, "stack", _stack):
        yield


@pytest.fixture(scope="session", autouse=True)
def _tiny_models_made_once() -> Iterator[None]:
    """Give a copy of each tiny model that was made before, a tenth of the work of making it again."""
    if (tiny := sys.modules.get(_TINY)) is None:
        yield  # and so does without: no test of this run asks for one
        return
    with mock.patch.object(tiny, "_made", copies_of(tiny._made, lambda: tiny._LAYERS)):
        yield


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Put torch's default dtype and grad mode back, and fail a test that left them changed."""
    before = (torch.get_default_dtype(), torch.is_grad_enabled())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled())
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    if after != before:
        pytest.fail(f"the test left torch's (default dtype, grad mode) at {after}, was {before}", pytrace=False)


@pytest.fixture(autouse=True)
def _global_rank() -> Iterator[None]:
    """Lightning keeps the process's rank in a global; what a test's strategy wrote there must not reach the next."""
    yield
    if (module := sys.modules.get("lightning_utilities.core.rank_zero")) is not None:
        module.rank_zero_only.rank = 0


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe's smoke run by the recipe's name, made once for all processes; copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke"

    def folder_of(name: str) -> Path:
        import budget

        from lightning_interp import cli

        folder, done = root / name, root / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                before = dict(os.environ)
                with budget.apart(f"smoke run of {name}"):
                    assert cli.main(["run", name, "--smoke=true", f"--run_dir={folder}"]) == 0
                os.environ.clear()
                os.environ.update(before)
                done.touch()
        return folder

    return folder_of


# Tiny models have four layers, which grafts name by quarters; of three, one is first, one inner and one last.
_THREE_LAYERS = {"generation", "lightning", "rate", "running", "steering", "testing"}


@pytest.fixture(scope="module", autouse=True)
def _three_layers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models of three layers in the folders where that is as good as four: a quarter less to compute."""
    shallow = request.path.parent.name in _THREE_LAYERS and request.path.is_relative_to(Path(__file__).parent)
    with mock.patch(f"{_TINY}._LAYERS", 3) if shallow else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def two_layers() -> Iterator[None]:
    """Tiny models of two layers, which train as those of four do, in three quarters of the time."""
    with mock.patch(f"{_TINY}._LAYERS", 2):
        yield


@pytest.fixture(scope="session")
def portable_4bit() -> Iterator[None]:
    """4-bit maps as every CPU computes them: with AVX512-BF16, bitsandbytes repacks the weights and works in bf16."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    patch = pytest.MonkeyPatch()
    patch.setattr(modules, "has_avx512bf16", lambda: False)
    yield
    patch.undo()
