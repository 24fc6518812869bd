"""What the grafting recipes share: facts in files, finetuning that goes on where it stopped, tables of results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.core.measure.statistics import Estimate, mean_interval
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.errors import DataError
from lightning_interp.grafting.facts import Fact
from lightning_interp.grafting.metrics import METRICS
from lightning_interp.grafting.prompts import GraftPrompt
from lightning_interp.grafting.result import GraftResult

if TYPE_CHECKING:
    from lightning_interp.models import LoraSettings

__all__ = [
    "averaged",
    "compact",
    "dropped_rows",
    "finetune",
    "metrics_of",
    "read_facts",
    "read_prompts",
    "write_jsonl",
]


def write_jsonl(folder: Path, files: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """Write rows, one JSON object a line.

    Args:
        folder: Where.
        files: Rows by file name (without its ending): dicts, or facts.

    Returns:
        Number of rows by name.
    """
    for name, rows in files.items():
        plain = [asdict(row) if isinstance(row, Fact) else row for row in rows]
        atomic_write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in plain))
    return {name: len(rows) for name, rows in files.items()}


def read_facts(path: Path) -> list[Fact]:
    """Read facts that :func:`write_jsonl` wrote."""
    return [Fact(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def read_prompts(path: Path) -> list[GraftPrompt]:
    """Read a user's prompts.

    Args:
        path: JSONL: ``text`` and ``target``, and if wished ``spans``, ``unit`` and ``form``.

    Returns:
        The prompts.

    Raises:
        DataError: With file and line, if a line is no such object; if there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the prompts {str(path)!r}: {error}. Expected a JSONL file in UTF-8.") from error
    prompts = [_prompt(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompts. Expected one JSON object a line with 'text' and 'target'.")
    return prompts


def _prompt(line: str, where: str) -> GraftPrompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}). Expected one object a line.") from error
    known = {"text": str, "target": str, "spans": dict, "unit": str | int, "form": str}
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}, expected an object with 'text' and 'target'.")
    for key, value in row.items():
        if key not in known or not isinstance(value, known[key]):
            raise DataError(f"{where}: {key!r} is {value!r}; expected the keys {', '.join(known)} (spans: an object).")
    if lacking := [key for key in ("text", "target") if not row.get(key)]:
        raise DataError(f"{where}: {lacking[0]!r} is missing or empty.")
    spans = row.get("spans", {})
    if wrong := [key for key, part in spans.items() if not isinstance(part, str)]:
        raise DataError(f"{where}: the span {wrong[0]!r} is {spans[wrong[0]]!r}; expected a piece of the text.")
    return GraftPrompt(row["text"], row["target"], spans, str(row.get("unit", "")), row.get("form", ""))


def finetune(
    folder: Path,
    *,
    source: str,
    texts: Path,
    trainer: Callable[..., dict[str, Any]],
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    lora: LoraSettings | None = None,
    callbacks: Sequence[Any] = (),
    add_eos: bool = False,
    **module_settings: Any,
) -> dict[str, Any]:
    """Finetune with Lightning and export the result to ``folder/model``; goes on at the last checkpoint.

    Args:
        folder: The phase's folder.
        source: Where the model comes from.
        texts: JSONL of texts.
        trainer: The recipe's Trainer arguments, given the defaults of this one.
        epochs: Passes over the texts.
        lr: Learning rate; falls linearly to zero.
        batch_size: Texts a step.
        seed: Of order, adapter and dropout.
        lora: Train an adapter instead of all weights.
        callbacks: Besides the checkpoint.
        add_eos: Whether texts end with the end token.
        **module_settings: Of :class:`~lightning_interp.models.CausalLM`.

    Returns:
        ``{"loss": ...}`` of the last step.
    """
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_interp.models import CausalLM, TextDataModule

    module = CausalLM(source, lora=lora, lr=lr, schedule="linear", seed=seed, **module_settings)
    tokenizer = module.tokenizer
    data = TextDataModule(texts, tokenizer=tokenizer, batch_size=batch_size, seed=seed, add_eos=add_eos)
    # One file, the newest. save_last alone (save_top_k=0) writes nothing before the end of training.
    keep = ModelCheckpoint(folder / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False)
    settings = {"log_every_n_steps": 1, "gradient_clip_val": 1.0, "callbacks": [*callbacks, keep]}
    runner = L.Trainer(**trainer(max_epochs=epochs, **settings))
    last = folder / "checkpoints" / "last.ckpt"
    runner.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    if runner.is_global_zero:
        module.export(folder / "model")
    runner.strategy.barrier()
    return {"loss": float(runner.callback_metrics["train/loss"])}


def compact(found: GraftResult, plan: str, *, form: str | None = None) -> dict[str, Any]:
    """One printed row of a plan: accuracy, probability, rank and recovery with intervals over facts."""
    return {
        "plan": plan,
        "top-5": str(found.estimate(plan, "top5", form=form)),
        "probability": str(found.estimate(plan, "target_prob", form=form)),
        "median rank": found.estimate(plan, "target_rank", form=form).value,
        "recovery": str(found.recovery(plan, form=form)),
        "facts": len(found.values(plan, "top5", form)),
    }


def averaged(found: GraftResult, plans: Sequence[str], metric: str, *, form: str | None = None) -> Estimate:
    """One metric averaged over several plans (such as the seeds of graft dropout), with an interval over facts."""
    columns = [found.values(plan, metric, form) for plan in plans]
    return mean_interval([sum(values) / len(values) for values in zip(*columns, strict=True)])


def metrics_of(found: GraftResult) -> dict[str, Any]:
    """Every estimate with its interval, by form, plan and metric."""
    return {
        form: {plan: {m: found.estimate(plan, m, form=form).to_dict() for m in METRICS} for plan in found.plans}
        for form in found.forms()
    }


def dropped_rows(found: GraftResult) -> list[dict[str, Any]]:
    """Number and reason of every prompt that was dropped; one row that says so if none was."""
    rows: list[dict[str, Any]] = [{"prompt": number, "reason": reason} for number, reason in found.dropped]
    return rows or [{"prompt": None, "reason": "no prompt was dropped"}]
