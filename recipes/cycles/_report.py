"""What chains have shown, as a recipe's result: the tables, figures and sentences of a report of chains, and texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.core.measure.statistics import counted
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.cycles import Arm, Calibration, Chain, ChainReport, Checkpoint
from lightning_interp.recipe import RecipeResult, RunFolder
from lightning_interp.running.results import write_scalars

from ._common import SMALL_STUDY, TERMS

if TYPE_CHECKING:
    from ._chain import ChainRecipe, Condition


@dataclass
class Found:
    """The dose and the search for it; of each number cycle 0, what arms' chains returned, and the second evaluation."""

    dose: int
    search: Calibration | None
    starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    chains: list[tuple[Condition, int, dict[str, Any]]] = field(default_factory=list)
    again: dict[int, dict[str, Any]] = field(default_factory=dict)


def report_of(recipe: ChainRecipe, found: Found) -> ChainReport:
    """The chains as a report takes them."""
    main = recipe.arms()[0].name
    chains = []
    for arm, number, told in found.chains:
        again = Checkpoint.of(found.again[number]) if arm.name == main else None
        checkpoints = [_checkpoint(cycle["evaluation"]) for cycle in told["cycles"]]
        of = {"control": arm.control, "of": main if arm.control else ""}
        base = _checkpoint(told["base"])
        chains.append(Chain(arm.name, checkpoints, base=base, again=again, name=str(number), **of))  # type: ignore[arg-type]
    return ChainReport(chains, trait=recipe.trait, seed=recipe.seed, possible=recipe.possible.values())


def _checkpoint(evaluations: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint.of(evaluations["evaluate"])


def result(recipe: ChainRecipe, run: RunFolder, found: Found) -> RecipeResult:
    """Everything that a run leaves."""
    report = report_of(recipe, found)
    for arm, number, told in found.chains if run.writes else ():
        values = [cycle["evaluation"]["evaluate"]["score"]["value"] for cycle in told["cycles"]]
        write_scalars(run.path / "tensorboard" / f"{arm.key}-{number}", "score", values)
    title = f"{recipe.source}: {recipe.trait}"
    own, captions = recipe.own_figures(report, title)
    tables = {
        "scores": [_by_cycle(arm) for arm in report.arms.values()],
        **report.tables(),
        "dose": found.search.rows() if found.search else [],
        "training": [row for each in found.chains for row in _trained(found, *each)],
        "replies": [row for each in found.chains if each[1] == 0 for row in _replies(*each)],
    }
    return RecipeResult(
        metrics={
            "change": {name: arm.by_cycle("from_start")[-1].to_dict() for name, arm in report.arms.items()},
            "arms": report.metrics(),
            **_metrics(found),
        },
        tables={name: rows for name, rows in tables.items() if rows},
        figures=own | report.figures(title),
        artifacts={"first model": Path(found.starts[0]["folder"])},
        question=recipe.question(),
        findings=[*_dose_sentences(recipe, found), *recipe.own_findings(report), *report.findings()],
        captions=captions | report.captions(),
        terms={**TERMS, **_TERMS, **recipe.own_terms},
        caveats=[*caveats(recipe, found), *report.caveats()],
        summary="scores",
    )


_TERMS = {
    "SFT": "finetuning on own answers",
    "reinit, continual": "each cycle starts at the base with a new adapter, or at the weights of the last one",
    "0, 1, ..., last": "score after that cycle; in the table of scores coherence and distinct_2 are those of the last",
    "dose": "rows of the seed that cycle 0 learns",
    "change": "score minus that of cycle 0",
    "base": "the untouched model; its score is the dashed line",
    "perplexity": "of replies under the base",
    "loss and what stands behind it": "in the table of training: of a cycle's last batch, before its step",
    "asked, rows, dropped": "of a cycle: prompts that were asked, texts that were kept, and why others were not",
    "cut": "share of a cycle's texts that ran into the limit of tokens; they are learned without an end",
}


def _metrics(found: Found) -> dict[str, Any]:
    digests = {f"{arm.key}-{number}": [c["digest"] for c in told["cycles"]] for arm, number, told in found.chains}
    scored = {} if found.search is None else {str(n): x.to_dict() for n, x in found.search.scored.items()}
    return {"dose": found.dose, "dose_scores": scored, "digests": digests}


def _by_cycle(arm: Arm) -> dict[str, Any]:
    """An arm's scores in one row, and what became of coherence and repetition."""
    base, scores, coherence = arm.chains[0].base, arm.by_cycle("scores"), arm.by_cycle("coherence")
    verdict, last = arm.verdict(1), [chain.checkpoints[arm.cycles - 1].distinct_2 for chain in arm.chains]
    row = {"arm": arm.name, "base": None if base is None else base.score}
    row |= {str(k): score.value for k, score in enumerate(scores)} | {"last": str(scores[-1])}
    row |= {"coherence": coherence[-1].value if coherence else None, "distinct_2": mean_known(last)}
    return row | {"class_1": None if verdict is None else verdict.name}


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _trained(found: Found, arm: Condition, number: int, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a cycle: what it wrote and learned."""
    rows = []
    for cycle in told["cycles"]:
        counts = found.starts[number]["counts"] if "take" in cycle["counts"] else cycle["counts"]
        fit: dict[str, Any] = next((value for name, value in counts.items() if name.startswith("fit-")), {})
        wrote, logged = counts.get("generate", {}), fit.get("logged", {})
        texts = wrote.get("rows", 0) * (2 if any("margin" in name for name in logged) else 1)
        rows.append(
            {
                "arm": arm.name, "chain": number, "cycle": cycle["cycle"], "asked": wrote.get("asked"),
                "rows": fit.get("rows"), "dropped": wrote.get("dropped") or None,
                "cut": wrote["truncated"] / texts if texts else None, "steps": fit.get("steps"),
                **{name.removeprefix("train/"): value for name, value in sorted(logged.items())},
            }
        )  # fmt: skip
    return rows


def _replies(arm: Condition, number: int, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each model of a chain says to the first question, with the same random numbers."""
    rows = []
    for cycle in told["cycles"]:
        path = Path(cycle["folder"]) / "phases/evaluate/eval_responses.jsonl"
        first = next(row for _, row in json_lines(path, own=True))
        rows.append(
            {
                "arm": arm.name, "cycle": cycle["cycle"], "question": first["prompt"], "reply": first["text"],
                "score": first["score"], "coherence": first["coherence"],
            }
        )  # fmt: skip
    return rows


def _dose_sentences(recipe: ChainRecipe, found: Found) -> list[str]:
    if found.search is None:
        return []
    score, known = found.search.scored[found.dose], counted(len(found.search.scored), "dose")
    over = f"{counted(score.n, 'question')}, up to three replies to each"
    what = "the smallest" if found.search.reached[recipe.target] else "the largest, as none"
    return [
        f"Dose: of {known} tried, {found.dose} rows of the seed are {what} whose model reaches a score of "
        f"{recipe.target:g}: it has {score} (interval over {over})."
    ]


def caveats(recipe: ChainRecipe, found: Found) -> list[str]:
    """What the numbers may not be used for, beside what the report of chains says."""
    said = ["A smoke run: the numbers mean nothing."] if recipe.smoke else []
    if recipe.source == type(recipe).model:
        said += ["The model is SmolLM2-135M-Instruct, dequantised 4-bit, and not the original.", SMALL_STUDY[0]]
    said += [_cut_sentence(recipe, found), SMALL_STUDY[2]]
    said += [] if recipe.seed_data else [SMALL_STUDY[3]]
    first = found.chains[0][2]["cycles"][0]["evaluation"]["evaluate"]["score"]["value"]
    base = found.chains[0][2]["base"]["evaluate"]["score"]["value"]
    if first is not None and (first > 90 or first - (base or 0) < 5):
        where = "near its ceiling" if first > 90 else "hardly above the base's"
        said.append(
            f"The score after cycle 0, {first:.1f}, is {where}: a chain from there can go one way only. Give another "
            "n_seed or target."
        )
    said += found.search.warnings if found.search else ()
    return said + recipe.own_caveats()


def _cut_sentence(recipe: ChainRecipe, found: Found) -> str:
    """How long texts may be, and how many would have been longer."""
    shares = [row["cut"] for each in found.chains for row in _trained(found, *each) if row["cut"] is not None]
    share = f"; of those that cycles learned {sum(shares) / len(shares):.0%} would have been longer" if shares else ""
    return f"Texts have at most {recipe.max_new_tokens} tokens, against up to 1,024 in the paper{share}."
