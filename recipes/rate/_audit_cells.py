"""Several attributes and rewards in one run: an audit for each pair, which share rewrites and scorers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from lightning_interp.errors import RecipeError
from lightning_interp.recipe import RecipeResult, RunFolder

from ._scored import ScoredBy, told

OF_ATTRIBUTE = ("attribute", "data", "label", "check", "toggle", "always", "template", "store", "whose")
OF_REWARD = ("reward", *(entry.name for entry in fields(ScoredBy)))

_ALL = "attributes_and_rewards"  # the table and the figure of all pairs

Audit = Any  # the recipe, which imports this file
Cells = list[list[Audit]]


def cells_of(recipe: Audit) -> Cells:
    """The recipe with each attribute (rows) and each reward (columns), and without the others.

    Raises:
        RecipeError: If two have one name, a setting is no attribute's or reward's own, or one of the audits could not
            be run alone.
    """
    attributes, rewards = (
        _entries(recipe, "attribute", "attribute", OF_ATTRIBUTE),
        _entries(recipe, "reward", "vader", OF_REWARD),
    )
    rows, columns = _short(list(attributes)), _short(list(rewards))
    found: Cells = []
    for row, (name, attribute) in zip(rows, attributes.items(), strict=True):
        found.append([])
        for column, (reward_name, reward) in zip(columns, rewards.items(), strict=True):
            cell = replace(recipe, attributes=[], rewards=[], **attribute, **reward)
            cell.imports, cell.prefix = recipe.imports, f"{row}_{column}_"
            cell.called = (name, reward_name)
            cell.phases = (f"rewrite-{row}", f"score-{column}", f"effects-{row}-{column}")
            found[-1].append(cell)
    return found


def _entries(recipe: Audit, key: str, default: str, own: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings of each attribute or reward, by the name that it has in tables."""
    given, single = getattr(recipe, f"{key}s"), getattr(recipe, key)
    if given and single != default:
        raise RecipeError(f"{key}={single!r} beside {key}s: name it among these, or leave one of the two out.")
    listed = [dict(one) if isinstance(one, Mapping) else {key: one} for one in given] or [{key: single}]
    hints = get_type_hints(type(recipe))
    for one in listed:
        if not one.get(key) or not one.keys() <= set(own):
            raise RecipeError(f"{key}s has {one!r:.120}: expected {key}, and of its own {', '.join(own[1:])}.")
        for name, value in one.items():
            if not isinstance(value, list if get_origin(hints[name]) is list else hints[name]):
                raise RecipeError(f"{key}s, {one[key]!r:.80}: {name}={value!r:.80} is a {type(value).__name__}.")
    names = [str(one[key]) for one in listed]
    if len(set(names)) < len(names) and key == "reward":  # one model may be several rewards: by what differs
        apart = {name for one in listed for name in one if len({str(each.get(name)) for each in listed}) > 1}
        names = [", ".join([one[key], *(f"{k}={one[k]}" for k in one if k in apart - {key})]) for one in listed]
    if len(set(names)) < len(names):
        raise RecipeError(f"{key}s names {', '.join(names)}: two of them are the same. Give each a name of its own.")
    return dict(zip(names, listed, strict=True))


def _short(names: Sequence[str]) -> list[str]:
    """Names that can be parts of a file's name."""
    short = [
        re.sub(r"\W+", "-", name.rstrip("/").rpartition("/")[2], flags=re.ASCII).strip("-_")[:36] for name in names
    ]
    twice = len({one.lower() for one in short}) < len(short) or not all(short)
    return [f"{one}{number}" if twice else one for number, one in enumerate(short, start=1)]


def study_cells(cells: Cells, run: RunFolder) -> RecipeResult:
    """Rewrite for each attribute, score with each reward, and estimate each pair's effects, in phases of their own."""
    checked = run.phase("check", lambda _: check_all(cells))
    if checked["plan"]:
        print(checked["plan"])
    rewritten, reports = [], tuple[Any, ...]()
    for first, *_ in cells:
        first.reports = reports  # what the attributes before have cost counts
        rewritten.append(run.phase(first.phases[0], partial(first.rewrite, run)))
        reports = first.reports
    columns = [list(column) for column in zip(*cells, strict=True)]
    scored = [run.phase(one[0].phases[1], partial(scores, one, run), every_rank=True) for one in columns]
    studies = [[cell.effects(run, scored[b][a]) for b, cell in enumerate(row)] for a, row in enumerate(cells)]
    results = [
        [cell.result(run, rewritten[a], scored[b][a], studies[a][b]) for b, cell in enumerate(row)]
        for a, row in enumerate(cells)
    ]
    return together(cells, studies, results, rewritten)


def check_all(cells: Cells) -> dict[str, Any]:
    """Build all that is named, and let every reward score a text, before the first text is paid for."""
    from ._named import named_labeller
    from ._rewriters import Endpoint, Replay

    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for number, (first, *_) in enumerate(cells):
            units = first.units()
            if name := first.check or first.label:
                named_labeller(name, [unit.text for unit in units])
            if first._told is not None and not isinstance(first._told, Replay):
                jobs.append(first.job(Path(folder) / str(number)))
        asks = isinstance(cells[0][0]._told, Endpoint)
        plan = cells[0][0].agreed(*jobs) if asks else ""
    asking = [next((cell for cell in column if not cell.in_file), None) for column in zip(*cells, strict=True)]
    reads = [told(cell.tried()) for cell in asking if cell is not None]
    return {"plan": "\n".join(filter(None, (plan, *reads)))}


def scores(column: Sequence[Audit], run: RunFolder, folder: Path) -> list[dict[str, Any]]:
    """Rewards by one scorer of the texts of each attribute, text by text on disk, so that a killed run goes on."""
    from lightning_interp.rate import RewardScorer

    from ._example import exact_effects

    triples = [one.triples(run) for one in column]
    found: list[dict[str, Any]] = [
        {"scorer": one.reward, "rewards": one.finished(units), "truth": None, "reads": []}
        for one, units in zip(column, triples, strict=True)
    ]
    if places := [place for place, one in enumerate(found) if one["rewards"] is None]:
        first, asked = column[places[0]], [triples[place] for place in places]
        scorer = first.scorer()
        settings = first.trainer_kwargs(run, logger=False, enable_checkpointing=False)
        RewardScorer(scorer, asked[0], folder / "rewards.jsonl", also=asked[1:]).run(**settings)
        for place, units in zip(places, asked, strict=True):
            truth = exact_effects(units, scorer) if first.example else None
            reads = scorer.reading(units.prompts[0], units.original[0])
            found[place] |= {"scorer": scorer.name, "truth": truth, "reads": reads}
    return found


def together(
    cells: Cells, studies: list[list[Any]], results: list[list[RecipeResult]], rewritten: list[dict[str, Any]]
) -> RecipeResult:
    """A table of attributes and rewards first, and behind it what was found of each pair."""
    from lightning_interp.rate.report.explained import CAPTIONS, effect_findings
    from lightning_interp.rate.report.figures import effects_figure

    pairs = list(zip(chain(*cells), chain(*studies), chain(*results), strict=True))
    rows, found = [], dict[str, dict[str, Any]]()
    for cell, study, result in pairs:
        attribute, reward = cell.called
        effects = {row["estimator"]: row for row in study.tables()["effects"] if row["estimand"] == "ATE"}
        own = effects["double rewrite (RATE)"]
        shown = {estimator: row["raw"] for estimator, row in effects.items()}
        rows.append(
            {"attribute": attribute, "reward": reward, **shown, "RATE in sd": own["in sd"], "units": own["units"]}
        )
        found.setdefault(attribute, {})[reward] = result.metrics
    named = {", ".join(cell.called): study for cell, study, _ in pairs}
    figure = effects_figure(
        {name: study.result for name, study in named.items()},
        standardized=all(study.line is not None for study in named.values()),
    )
    plans = [text["plan"] for text in rewritten if text["plan"]]
    return RecipeResult(
        metrics={"cells": found, "calls": sum(text["calls"] for text in rewritten), "plan": "\n".join(plans)},
        tables={_ALL: rows, **_all(result.tables for _, _, result in pairs)},
        figures={_ALL: figure, **_all(result.figures for _, _, result in pairs)},
        artifacts=_all(result.artifacts for _, _, result in pairs),
        question=f"How much does each reward change because of each attribute? ({len(cells)} x {len(cells[0])})",
        findings=[
            effect_findings(study.result, of=cell.named, on=f"the reward {cell.called[1]!r}")[0]
            for cell, study, _ in pairs
        ],
        captions={_ALL: CAPTIONS["effects"], **_all(result.captions for _, _, result in pairs)},
        terms=pairs[0][2].terms,
        caveats=_caveats([(", ".join(cell.called), list(result.caveats)) for cell, _, result in pairs]),
        summary=_ALL,
    )


def _all(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(chain.from_iterable(part.items() for part in parts))


def _caveats(of: Sequence[tuple[str, list[str]]]) -> list[str]:
    """What holds of all pairs once, and the rest with the pair's name."""
    common = [note for note in of[0][1] if len(of) > 1 and all(note in notes for _, notes in of)]
    many = (
        f"Each interval is of its pair alone, not of all {len(of)} at once: without any effect about one in twenty of "
        "them would still lie beside zero. What was not expected before wants texts of its own."
    )
    own = [f"{name}: {note}" for name, notes in of for note in notes if note not in common]
    return [*([many] if len(of) > 1 else []), *common, *own]
