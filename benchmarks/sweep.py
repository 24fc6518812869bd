"""What do adapters of eight ranks cost when they train in one pass over a frozen base, against one after the other?

Both sides are Trainers on the same batches, one row an adapter; a step's time is forward, backward, clipping and AdamW.
The floor is what the products alone would take at the speed of one large product: the base forward and backward (no
gradients of its weights) for each row, and each adapter for its own.

    python benchmarks/sweep.py [--quick] [--device cpu|cuda] [--out sweep.json]
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _measure import PeakMemory, arguments, compare, finish, product_rate, row
from grafting import build
from lightning.pytorch.callbacks import Callback

from lightning_interp.lora import AdapterCell, train_adapters_together
from lightning_interp.models import CausalLM, LoraSettings, Optimisation, TextDataModule, load_causal_lm
from lightning_interp.testing import byte_tokenizer

RANKS = (1, 2, 4, 8, 16, 32, 48, 64)
STEPS = 4  # the first and the last, which writes what is finished, are not counted


class Clock(Callback):
    """Seconds of all steps but the first and the last: of the process, or of the GPU's host."""

    def __init__(self, device: str) -> None:
        self.now = time.process_time if device == "cpu" else self._synchronised
        self.seconds = 0.0

    @staticmethod
    def _synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with the second step."""
        if batch_idx == 1:
            self.begun = self.now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End with the last but one."""
        if batch_idx == STEPS - 2:
            self.seconds = self.now() - self.begun


def cells_of(tokenizer: Any, tokens: int) -> list[AdapterCell]:
    """Eight adapters on all linear maps, each with rows of so many tokens, all of them labelled."""
    made = []
    for rank in RANKS:
        rows = [{"text": f"{rank} {i} " + "and the number after it is " * tokens} for i in range(STEPS)]
        data = TextDataModule(rows, tokenizer=tokenizer, batch_size=1, max_length=tokens, seed=rank)
        how = Optimisation(lr=2e-4)
        lora = LoraSettings(r=rank, alpha=rank)
        made.append(AdapterCell(key=f"r{rank}", data=data, lora=lora, optimisation=how, max_steps=STEPS, clip=1.0))
    return made


def options(clock: Clock, folder: Path, device: str) -> dict[str, Any]:
    """Arguments of every Trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    kind = "cpu" if device == "cpu" else "gpu"
    return {"accelerator": kind, "devices": 1, "default_root_dir": folder, "callbacks": [clock], **quiet}


def together(model: Any, tokenizer: Any, tokens: int, device: str) -> float:
    """Seconds of the counted steps of all adapters in one pass."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as out:
        settings = options(clock, Path(out), device)
        train_adapters_together(model, tokenizer, cells_of(tokenizer, tokens), out, trainer=settings)
    return clock.seconds


def one_by_one(model: Any, tokenizer: Any, tokens: int, device: str) -> float:
    """Seconds of the same steps, each adapter in a CausalLM and a Trainer of its own over shared base weights."""
    spent = 0.0
    for cell in cells_of(tokenizer, tokens):
        clock = Clock(device)
        base = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        module = CausalLM(base, lora=cell.lora, optimisation=cell.optimisation, seed=cell.seed)
        with tempfile.TemporaryDirectory() as out:
            settings = options(clock, Path(out), device)
            trainer = L.Trainer(**settings, max_steps=STEPS, gradient_clip_val=cell.clip, enable_checkpointing=False)
            trainer.fit(module, cell.data)
        spent += clock.seconds
    model.requires_grad_(True)
    return spent


def floor(model: Any, tokens: int, device: str) -> dict[str, float]:
    """GFLOP of one row, of the base and of the mean adapter, and the seconds that they take at least."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    base = sum(4 * tokens * module.weight.numel() for module in linear) / 1e9  # forward, and the gradient of the input
    sizes = sum(sum(module.weight.shape) for module in linear if module is not head)
    adapter = 6 * tokens * sizes * statistics.mean(RANKS) / 1e9  # its weights have gradients too
    floor_seconds = (base + adapter) / product_rate(device)
    return {"floor_base_gflop": base, "floor_adapter_gflop": adapter, "floor_seconds": floor_seconds}


def memory(model: Any, tokenizer: Any, size: str, tokens: int, chosen: Any) -> dict[str, Any]:
    """Peak of the common passes with their base, against eight bases; first of all, while the heap is new."""
    with PeakMemory(chosen.device) as peak:
        together(model, tokenizer, tokens, chosen.device)
    base = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    trained = 4 * 4 * sum(RANKS) * sum(sum(m.weight.shape) for m in maps) / 2**20
    parts = {"base": base, "adapters_gradients_moments": trained, "activations_and_rest": peak.megabytes - trained}
    name = f"{size}, {tokens} tokens a row: memory"
    return row(name, base + peak.megabytes, len(RANKS) * base, "bases of one by one", unit="MB", detail=parts)


def measure(model: Any, tokenizer: Any, size: str, tokens: int, target: float, chosen: Any) -> dict[str, Any]:
    """Seconds an example of both."""
    examples = len(RANKS) * (STEPS - 2)
    times: dict[str, list[float]] = {"together": [], "one by one": []}
    for _ in range(1 if chosen.quick else 2):
        for name, run in (("together", together), ("one by one", one_by_one)):
            gc.collect()
            times[name].append(run(model, tokenizer, tokens, chosen.device) / examples)
    limit = None if chosen.quick else 1 / target
    name, unit = f"{size}, {tokens} tokens a row", "s an example" if chosen.device == "cuda" else "CPU s an example"
    detail = floor(model, tokens, chosen.device)
    found = compare(name, times, "together", "one by one", unit=unit, target=limit, detail=detail)
    found["detail"]["times_as_many_examples"] = 1 / found["ratio"]
    return found


def main() -> None:
    """Measure and print the JSON."""
    chosen: argparse.Namespace = arguments(__doc__.splitlines()[0])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    gpu = chosen.device == "cuda"
    if chosen.quick:
        model, tokenizer, size, lengths = build("28M", chosen.device), byte_tokenizer(), "28M", {32: 1.6}
    else:
        loaded = load_causal_lm("smollm2-135m-instruct")
        model, tokenizer, size = loaded.model.to(chosen.device), loaded.tokenizer, "SmolLM2-135M"
        lengths = {32: 1.6, 16: 2.3, 128: 1.1} if not gpu else {32: 3.0, 128: 3.0}
    rows = [memory(model, tokenizer, size, 32, chosen)]
    rows += [measure(model, tokenizer, size, tokens, target, chosen) for tokens, target in lengths.items()]
    finish("cost of adapters that train together", rows, chosen)


if __name__ == "__main__":
    main()
