"""The trainings of a cycle: a Trainer beside a loop by hand, DPO with and without a cache, packed and sorted rows."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from _measure import PeakMemory, compare, product_rate, row
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lightning_interp.cycles import FitDocuments, FitDPO, FitSFT
from lightning_interp.models import DPO, CausalLM, DPODataModule, LoraSettings, TextDataModule
from lightning_interp.models.training.head_loss import labelled_logps
from lightning_interp.models.training.lora import inject_lora
from lightning_interp.models.training.loss_callback import StepLosses
from lightning_interp.models.training.optimisation import adamw, schedule_of
from lightning_interp.models.training.resumable import fit_or_go_on
from lightning_interp.testing import byte_tokenizer

LORA = LoraSettings(r=16, alpha=32)  # that of cycles
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
EPOCHS = 3  # of DPO


def now(device: str) -> float:
    """CPU seconds of this process, or with a GPU seconds of its host, when the device has done what it was told."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(L.Callback):
    """Times of a training: its begin, its first step, the end of each epoch, and what a step takes."""

    def __init__(self, device: str) -> None:
        self.device, self.epochs, self.steps = device, list[float](), list[float]()
        self.begin = now(device)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note when the first, the second and the last step of an epoch begin."""
        if not self.epochs and batch_idx == 0:
            self.first = now(self.device)
        if batch_idx == 1:
            self.second = now(self.device)
        if batch_idx == trainer.num_training_batches - 1:
            self.steps.append((now(self.device) - self.second) / (batch_idx - 1))

    @property
    def a_step(self) -> float:
        """Mean of all steps but an epoch's first and last."""
        return sum(self.steps) / len(self.steps)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note it."""
        self.epochs.append(now(self.device))


def fit(module: Any, data: Any, device: str, *, epochs: int = 1) -> tuple[Clock, list[float]]:
    """Train as a cycle does (a checkpoint each 50 steps and at the end, each step's loss kept); times and losses."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        losses = StepLosses(Path(folder) / "metrics.jsonl", lambda steps: nullcontext(lambda done: None))
        kind = {"accelerator": "cpu" if device == "cpu" else "gpu", "devices": 1, "default_root_dir": folder}
        given = {**QUIET, **kind, "max_epochs": epochs, "callbacks": [clock, losses]}
        fit_or_go_on(module, data, Path(folder), given, every=FitSFT.checkpoint_every)
        return clock, [loss for _, loss in losses.state_dict()["losses"]]


def alternated(runs: Mapping[str, Callable[[], float]], chosen: Namespace, size: str = "") -> dict[str, list[float]]:
    """What runs measure of themselves, in turn; without ``--quick`` after one of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # as in _measure.alternate
    try:
        for number in range(repeats(size, chosen) + (not chosen.quick)):
            for name, run in runs.items():
                gc.collect()
                found = run()
                times[name] += [found] if chosen.quick or number else []
    finally:
        gc.unfreeze()
    return times


def repeats(size: str, chosen: Namespace) -> int:
    """How often something is measured."""
    return 1 if chosen.quick else 3 if "135M" in size else 5


def copied(base: Any) -> Any:
    """A model of its own over the same frozen weights in memory."""
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


def ids_of(count: int, lengths: tuple[int, int], seed: int = 0) -> list[list[int]]:
    """Random texts in a random order, their lengths spread evenly on a logarithmic scale."""
    draw, (least, most) = random.Random(seed), lengths  # noqa: S311
    sizes = [round(least * (most / least) ** (i / max(1, count - 1))) for i in range(count)]
    draw.shuffle(sizes)
    return [[draw.randrange(5, 250) for _ in range(size)] for size in sizes]


def floor(base: Any, tokens: float, scored: float, device: str, *, passes: int = 1) -> dict[str, float]:
    """GFLOP of a step over a frozen base with an adapter, and its seconds at the speed of one large product."""
    linear = [module for module in base.modules() if isinstance(module, torch.nn.Linear)]
    head = base.get_output_embeddings()
    body = sum(module.weight.numel() for module in linear if module is not head)
    adapter = LORA.r * sum(sum(module.weight.shape) for module in linear if module is not head)
    gflop = (tokens * (4 * body + 6 * adapter) + scored * 4 * head.weight.numel()) / 1e9 * passes
    return {"floor_gflop": gflop, "floor_seconds": gflop / product_rate(device)}


def by_hand(
    base: Any, batches: Sequence[Mapping[str, Tensor]], device: str, *, trim: bool
) -> tuple[float, list[float]]:
    """Seconds a step and losses of a loop as one writes it: the same AdamW, schedule, adapter and loss.

    With ``trim`` the head is asked for the columns that predict what is scored, as by :class:`CausalLM`.
    """
    model, settings = copied(base), FitSFT().optimisation
    inject_lora(model, LORA, seed=0)
    model.train()
    optimizer = adamw(model.parameters(), settings)
    schedule: Any = schedule_of(optimizer, settings, total_steps=len(batches))
    losses, times = [], dict[int, float]()
    for number, batch in enumerate(batches):
        if number in (1, len(batches) - 1):
            times[number] = now(device)
        ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        first = int((batch["labels"] != -100).any(dim=0).int().argmax()) - 1 if trim else 0
        columns = {"logits_to_keep": torch.arange(first, labels.shape[1], device=device)} if trim else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **columns).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, first + 1 :].flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        if schedule is not None:  # a warm-up of less than half a step is none
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return (times[len(batches) - 1] - times[1]) / (len(batches) - 2), [float(loss) for loss in losses]


def training(base: Any, size: str, chosen: Namespace) -> list[dict[str, Any]]:
    """Seconds a step of ``CausalLM`` in a Trainer, against a loop by hand on the same batches."""
    steps, device = (6 if chosen.quick else 20) * (3 if "tiny" in size else 1), chosen.device
    answers = zip(ids_of(2 * steps, (12, 24)), ids_of(2 * steps, (24, 40), seed=1), strict=True)
    rows = [{"prompt_ids": prompt, "completion_ids": answer} for prompt, answer in answers]

    def data() -> TextDataModule:
        return TextDataModule(rows, tokenizer=byte_tokenizer(), batch_size=FitSFT.batch_size)

    batches, losses = list(data().train_dataloader()), dict[str, list[float]]()

    def ours() -> float:
        module = CausalLM(copied(base), lora=LORA, optimisation=FitSFT().optimisation)
        clock, losses["ours"] = fit(module, data(), device)
        return clock.a_step

    def peer(trim: bool) -> Callable[[], float]:
        def run() -> float:
            a_step, losses["by hand"] = by_hand(base, batches, device, trim=trim)
            torch.testing.assert_close(losses["ours"], losses["by hand"], atol=1e-4, rtol=1e-4)
            return a_step

        return run

    runs = {"Trainer": ours, "loop by hand": peer(True), "loop by hand, all columns": peer(False)}
    if chosen.quick:
        del runs["loop by hand, all columns"]
    times = alternated(runs, chosen, size)
    tokens = sum(batch["input_ids"].numel() for batch in batches) / steps
    scored = sum(int((batch["labels"] != -100).sum()) for batch in batches) / steps
    detail = {
        "same": "batches, adapter, AdamW, schedule, losses to 1e-4; the loop has its batches ready",
        "rows_a_batch": FitSFT.batch_size, "steps": steps, "tokens_a_step": tokens, "scored_a_step": scored,
        **floor(base, tokens, scored, device),
    }  # fmt: skip
    targets = {"loop by hand": None if chosen.quick or "tiny" in size else 1 / 0.95, "loop by hand, all columns": None}
    return [
        compare(f"{size}: training step", times, "Trainer", peer, unit=unit(chosen, "a step"), detail=detail,
                target=targets[peer])
        for peer in list(runs)[1:]
    ]  # fmt: skip


class ReferenceEachStep(DPO):
    """The other way: in each step the reference is asked too, with adapters switched off."""

    def on_fit_start(self) -> None:
        """Compute nothing beforehand."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Ask the reference, then as always."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        with torch.no_grad():
            reference = self.sequence_logps(batch)
        for layer in layers:
            layer.enable_adapters(True)
        return super().training_step({**batch, "reference": reference}, batch_idx)


def preference(base: Any, size: str, chosen: Namespace) -> list[dict[str, Any]]:
    """DPO with the reference's log-probabilities cached, against asking the reference in each step."""
    steps, longest, count = (3, 12, FitDPO.batch_size) if chosen.quick else (12, 32, FitDPO.batch_size)
    spans = [(longest // 2, longest // 2), (longest // 2, longest), (longest // 2, longest)]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    texts = (ids_of(count * steps, span, seed) for seed, span in enumerate(spans))
    rows = [dict(zip(keys, pair, strict=True)) for pair in zip(*texts, strict=True)]
    clocks: dict[str, list[Clock]] = {"cached": [], "each step": [], "cache there": []}
    losses: dict[str, list[float]] = {}

    def run(name: str, kind: type[DPO], folder: Path) -> None:
        module = kind(copied(base), lora=LORA, optimisation=FitDPO().optimisation, beta=FitDPO.beta)
        how: dict[str, Any] = {"tokenizer": byte_tokenizer(), "batch_size": count}
        file = folder / ("none" if name == "each step" else "reference.safetensors")
        gc.collect()
        clock, losses[name] = fit(module, DPODataModule(rows, reference=file, **how), chosen.device, epochs=EPOCHS)
        clocks[name].append(clock)

    for _ in range(repeats(size, chosen)):
        with tempfile.TemporaryDirectory() as folder:
            for name, kind in (("cached", DPO), ("each step", ReferenceEachStep), ("cache there", DPO)):
                run(name, kind, Path(folder))
        for name in ("cached", "cache there"):
            torch.testing.assert_close(losses[name], losses["each step"], atol=1e-3, rtol=1e-3)
    return _preference_rows(clocks, base, size, chosen, rows)


def _preference_rows(
    clocks: Mapping[str, list[Clock]], base: Any, size: str, chosen: Namespace, rows: Sequence[Mapping[str, list[int]]]
) -> list[dict[str, Any]]:
    def times(read: Callable[[Clock], float]) -> dict[str, list[float]]:
        return {name: [read(clock) for clock in several] for name, several in clocks.items()}

    target = None if "tiny" in size else 1 / 1.25
    sizes = [len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    scored = sum(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
    share = FitDPO.batch_size / len(rows)
    a_step = {"pairs": FitDPO.batch_size, **floor(base, sum(sizes) * share, scored * share, chosen.device)}
    a_step["same"] = (
        "pairs, adapter, AdamW, loss to 1e-3; the other side switches the adapter off and asks in each step"
    )
    found = [compare(f"{size}: DPO step", times(lambda clock: clock.a_step), "cached", "each step",
                     unit=unit(chosen, "a step"), target=target, detail=a_step)]  # fmt: skip
    whole = unit(chosen, "a training")
    for epochs in (1, EPOCHS):
        spent = times(lambda clock, end=epochs - 1: clock.epochs[end] - clock.begin)  # type: ignore[misc]
        detail: dict[str, Any] = {"counted": "all of the fit but the last checkpoint: encoding, cache, steps"}
        detail |= {"floor_ratio": (2 * epochs + 1) / (3 * epochs), "epochs": epochs}
        name = f"{size}: DPO training of {epochs} epochs"
        found.append(compare(f"{name}, cache made", spent, "cached", "each step", unit=whole, detail=detail))
        detail = {**detail, "floor_ratio": 2 / 3}
        found.append(compare(f"{name}, cache there", spent, "cache there", "each step", unit=whole, detail=detail,
                             target=target))  # fmt: skip
    return found


def documents(base: Any, size: str, chosen: Namespace) -> list[dict[str, Any]]:
    """Documents packed, or sorted by length within windows, against a batch of documents in random order."""
    count, lengths, device = 12 if chosen.quick else 48, (8, 64) if chosen.quick else (16, 128), chosen.device
    rows = [{"prompt_ids": [], "completion_ids": text} for text in ids_of(count, lengths)]
    ways = {
        "padded": {"batch_size": 4},
        "packed": {"packing": True, "batch_size": 2},
        "sorted": {"length_window": 50, "batch_size": 4},
    }
    counts: dict[str, Any] = {}

    def run(way: str) -> Callable[[], float]:
        def one() -> float:
            module = CausalLM(copied(base), lora=LORA, optimisation=FitDocuments().optimisation)
            data = TextDataModule(rows, tokenizer=byte_tokenizer(), max_length=lengths[1], **ways[way])
            clock, _ = fit(module, data, device)
            counts[way] = data.counts["train"]
            return (clock.epochs[-1] - clock.first) / counts[way]["tokens"] * 1000

        return one

    times = alternated({way: run(way) for way in ways}, chosen, size)
    told = {"padded": f"{ways['padded']}", "tokens": counts["sorted"]["tokens"], "lengths": lengths, "documents": count}
    told |= {name: counts["sorted"][name] for name in ("padding", "padding_unsorted")} | {
        "unfilled": counts["packed"]["unfilled"]
    }
    told |= floor(base, 1000, 1000, device)
    return [
        compare(f"{size}: documents {way}", times, way, "padded", unit=unit(chosen, "for 1000 tokens"), target=1.0,
                detail={**told, "ours": f"{ways[way]}"})
        for way in ("packed", "sorted")
    ]  # fmt: skip


def head_loss(chosen: Namespace) -> list[dict[str, Any]]:
    """Peak memory, seconds and gradients of log-probabilities in chunks, against all logits at once."""
    tokens, vocabulary, width, device = 2048, 49152, 64 if chosen.quick else 576, chosen.device
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width).to(device).requires_grad_()
        weight = (torch.randn(vocabulary, width) / width**0.5).to(device)
        targets = torch.randint(vocabulary, (tokens,)).to(device)
    ways: dict[str, Callable[[], Tensor]] = {
        "chunks": lambda: -labelled_logps(hidden, weight, targets).mean(),
        "all logits": lambda: F.cross_entropy(hidden @ weight.T, targets),
    }
    found = []
    for trained in (False,) if chosen.quick else (False, True):
        weight.requires_grad_(trained)
        peaks, slopes, times = _both_heads(ways, hidden, weight, chosen)
        gap = float((slopes["chunks"] - slopes["all logits"]).norm() / slopes["all logits"].norm())
        gflop = 2 * (3 if trained else 2) * tokens * vocabulary * width / 1e9
        told = {"gradients_relative_difference": gap, "width": width, "logits_mb": 4 * tokens * vocabulary / 2**20}
        name = f"head of {vocabulary} words, {tokens} tokens, {'trained' if trained else 'frozen'}"
        found.append(row(f"{name}: peak memory", peaks["chunks"], peaks["all logits"], "all logits", unit="MB",
                         target=1 / 4, detail=told))  # fmt: skip
        told |= {"floor_gflop": gflop, "floor_seconds": gflop / product_rate(device)}
        found.append(compare(f"{name}: time", times, "chunks", "all logits", unit=unit(chosen), detail=told))
    return found


def _both_heads(
    ways: Mapping[str, Callable[[], Tensor]], hidden: Tensor, weight: Tensor, chosen: Namespace
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, list[float]]]:
    """Peaks, gradients and seconds of both."""
    peaks, slopes = dict[str, float](), dict[str, Tensor]()

    def run(name: str) -> float:
        hidden.grad = weight.grad = None
        with PeakMemory(chosen.device) as peak:
            begin = now(chosen.device)
            ways[name]().backward()  # type: ignore[no-untyped-call]
            spent = now(chosen.device) - begin
        assert hidden.grad is not None
        peaks[name] = max(peaks.get(name, 0.0), peak.megabytes)
        slopes[name] = hidden.grad if weight.grad is None else torch.cat([hidden.grad, weight.grad])
        return spent

    times = alternated({name: partial(run, name) for name in ways}, chosen)
    return peaks, slopes, times


def unit(chosen: Namespace, of: str = "") -> str:
    """Seconds of what."""
    return f"{'s' if chosen.device == 'cuda' else 'CPU s'} {of}".strip()
