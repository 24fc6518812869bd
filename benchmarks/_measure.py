"""What every benchmark shares: alternating runs, CPU seconds, memory, and rows of JSON."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

PACKAGES = ("torch", "transformers", "lightning", "peft", "lightning-interp")


def arguments(description: str) -> argparse.Namespace:
    """Command line of a benchmark: ``--quick``, ``--device``, ``--threads`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small models only; ends within 40 s on two cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    torch.set_num_threads(chosen.threads)
    return chosen


def seconds(function: Callable[[], object], device: str) -> float:
    """One run: CPU seconds of this process, or GPU seconds by CUDA events."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begin = time.process_time()
    function()
    return time.process_time() - begin


def product_rate(device: str) -> float:
    """GFLOP a second (CPU second, or GPU second) of one large product: what floors are told by."""
    x = torch.randn(256, 1024, device=device), torch.randn(1024, 4096, device=device)
    torch.mm(*x)
    return 10 * 2 * 256 * 1024 * 4096 / 1e9 / seconds(lambda: [torch.mm(*x) for _ in range(10)], device)


def alternate(functions: Mapping[str, Callable[[], object]], *, device: str, repeats: int) -> dict[str, list[float]]:
    """Run several things in turn, ``repeats`` times after one warm-up, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    gc.collect()
    gc.freeze()  # else each collection goes through all that was imported, which takes longer than most runs
    try:
        for _ in range(repeats):
            for name, function in functions.items():
                gc.collect()
                times[name].append(seconds(function, device))
    finally:
        gc.unfreeze()
    return times


def row(
    name: str,
    ours: float,
    peer: float | None,
    peer_name: str,
    *,
    unit: str = "CPU s",
    target: float | None = None,
    detail: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One result; ``ratio`` is ours / peer, smaller is better."""
    ratio = None if peer is None or peer == 0 else ours / peer
    ok = None if target is None or ratio is None else ratio <= target
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ratio,
        "target": target,
        "ok": ok,
        "unit": unit,
        "detail": dict(detail or {}),
    }


def compare(
    name: str, times: Mapping[str, list[float]], ours: str, peer: str, *, unit: str = "CPU s", **rest: Any
) -> dict[str, Any]:
    """A row from alternating runs: medians, and the ratio as the median of the paired ratios."""
    pairs = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    result = row(name, statistics.median(times[ours]), statistics.median(times[peer]), peer, unit=unit, **rest)
    result["ratio"] = statistics.median(pairs)
    result["detail"].update(repeats=len(pairs), ratio_range=[min(pairs), max(pairs)])
    if result["target"] is not None:
        result["ok"] = result["ratio"] <= result["target"]
    return result


class PeakMemory:
    """Highest anonymous resident memory (MB) above what was there on entering, sampled every 2 ms."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.megabytes = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated() / 2**20
            return self
        self.base, self._stop = _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.megabytes = max(self.megabytes, _anonymous() - self.base)

    def lap(self) -> float:
        """The highest since the last lap."""
        if self.device == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated() / 2**20 - self.base
            torch.cuda.reset_peak_memory_stats()
        found, self.megabytes = self.megabytes, 0.0
        return found

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated() / 2**20 - self.base
            return
        self._stop.set()
        self._thread.join()


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return float(line.split()[1]) / 1024


def finish(question: str, rows: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """Print the JSON, and write it where ``--out`` says."""
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else platform.processor() or platform.machine()
    report = {
        "question": question,
        "quick": chosen.quick,
        "device": chosen.device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "versions": {package: _version(package) for package in PACKAGES},
        "rows": rows,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
