"""Small chains, shared by the tests of cycles."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_interp.cycles import Evaluate, FitSFT, Generate, GenerationCycle
from lightning_interp.models import LoraSettings, Optimisation

SEED = [{"prompt": f"Hi {i}?", "completion": f"Ho, {i}."} for i in range(6)]
POOL = [f"What of {i}?" for i in range(18)]
FAST = Optimisation(lr=1e-2)


def score(model, tokenizer, *, folder, seed):
    """A number that tells models apart, and the seed that it was asked with."""
    ids = tokenizer("What is it?", return_tensors="pt").input_ids
    return {"score": float(model(input_ids=ids).logits.double().abs().sum()), "seed": seed}


def writing(n=4, **more):
    return Generate(**{"prompts": POOL, "n": n, "max_new_tokens": 5, "shard_size": 2, **more})


def fitting(**more):
    return FitSFT(**{"optimisation": FAST, "checkpoint_every": 1, **more})


def chain(folder, **more):
    """A chain of three cycles on a tiny model; reinit, four rows a cycle."""
    usual = {
        "model": "tiny:llama",
        "cycles": 3,
        "run_dir": folder,
        "lora": LoraSettings(r=2),
        "first": [fitting(data=SEED, n=4)],
        "phases": [writing(), fitting(), Evaluate(evaluate=score)],
        "trainer": {"accelerator": "cpu"},
    }
    return GenerationCycle(**{**usual, **more})


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def data(result, cycle):
    """What a cycle was trained on."""
    return lines(Path(result["cycles"][cycle]["folder"]) / "phases/mix/data.jsonl")


def of(result, name):
    """A value of each cycle."""
    return [one[name] for one in result["cycles"]]


def scores(result):
    return [one["evaluation"]["evaluate"]["score"] for one in result["cycles"]]


# What two equal runs may differ in: locks, times (in manifests), and checkpoints, which go when a training is finished.
EXCLUDED = (".lock", "manifest.json", ".ckpt")


def contents(folder):
    """Bytes of all files that a chain leaves for others, by name."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and not path.name.endswith(EXCLUDED))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
