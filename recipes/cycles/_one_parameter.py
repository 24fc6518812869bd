"""Arms of the policy of one parameter, their chains as a report takes them, and their tables, figure and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_interp.core.measure.statistics import t_interval
from lightning_interp.cycles import Chain, ChainReport, Checkpoint, OneParameter, gain_near_base
from lightning_interp.figures import BLUE, GREY, ORANGE, band, in_house_style, label, legend_below, panels

_SAME = 0.005  # of probability
_INITS = ("continual", "reinit")


def arms(recipe: Any) -> dict[str, OneParameter]:
    """How each arm is trained, by its name."""
    shared: dict[str, Any] = {"cycles": recipe.cycles, "base": recipe.base, "start": recipe.start}
    grid = [("sft", 1.0, lr, steps) for lr in recipe.sft_lrs for steps in recipe.sft_steps]
    grid += [("dpo", b, lr, steps) for b in recipe.betas for lr in recipe.dpo_lrs for steps in recipe.dpo_steps]
    found = {}
    for setting, beta, lr, steps in grid:
        of_dpo = f", beta {beta:g}" if setting == "dpo" and len(recipe.betas) > 1 else ""
        for init in _INITS:
            how = OneParameter(setting=setting, init=init, lr=lr, steps=steps, beta=beta, **shared)  # type: ignore[arg-type]
            found[f"{setting.upper()} lr {lr:g}, {steps} steps{of_dpo}, {init}"] = how
    return found


def expected_rows(
    settings: Mapping[str, OneParameter], expected: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """A row an arm: its settings, its gain, and its probability by cycle."""
    return [
        {
            "arm": name, "setting": how.setting, "init": how.init, "lr": how.lr, "steps": how.steps,
            "beta": how.beta if how.setting == "dpo" else None, "gain near the base": gain_near_base(how),
            "trend": trend(expected[name]), **{f"p{k}": p for k, p in enumerate(expected[name])},
        }
        for name, how in settings.items()
    ]  # fmt: skip


def trend(curve: Sequence[float]) -> str:
    """Whether a probability ends above, below or where it began."""
    change = curve[-1] - curve[0]
    return "holds" if abs(change) <= _SAME else "grows" if change > 0 else "fades"


def report_of(sampled: Mapping[str, Sequence[Sequence[float]]], *, base: float, seed: int) -> ChainReport:
    """Sampled chains as evaluations, each of one question that is answered without error."""

    def evaluated(p: float) -> Checkpoint:
        return Checkpoint.of({"scores": [[100 * p]]})

    chains = []
    for name, curves in sampled.items():
        twin = {"control": "reinit twin", "of": name.replace("reinit", "continual")} if name.endswith("reinit") else {}
        for number, curve in enumerate(curves):
            checkpoints = [evaluated(p) for p in curve]
            chains.append(Chain(name, checkpoints, base=evaluated(base), name=str(number), **twin))  # type: ignore[arg-type]
    return ChainReport(chains, seed=seed, resamples=2)  # one question: no interval is over questions


def findings(
    settings: Mapping[str, OneParameter], expected: Mapping[str, Sequence[float]], report: ChainReport, samples: int
) -> list[str]:
    """What the expected loss does, and how its sampled chains end."""
    said = []
    for setting, words in (("sft", "finetuned on own outputs"), ("dpo", "preferring own outputs to the base's")):
        for init in _INITS:
            of = [name for name, how in settings.items() if (how.setting, how.init) == (setting, init)]
            counts = {word: sum(trend(expected[name]) == word for name in of) for word in ("grows", "holds", "fades")}
            if of:
                told = ", ".join(f"{word} in {n}" for word, n in counts.items() if n)
                said.append(f"With the expected loss, {words}, {init}: the trait {told} of {len(of)} settings.")
    for name in settings:
        if name.endswith("continual"):
            twin = name.removesuffix("continual") + "reinit"
            one, other = report.arms[name], report.arms[twin]
            ends = [f"{arm.by_cycle('scores')[-1]} ({_class(arm)})" for arm in (one, other)]
            said.append(
                f"{name.removesuffix(', continual')}: of {len(one.chains)} chains of {samples} outputs a cycle, "
                f"continual ones end at {ends[0]} of 100, reinit ones at {ends[1]}."
            )
    return said


def _class(arm: Any) -> str:
    """The class of an arm's mean from both anchors, and whether it is settled."""
    found = [arm.verdict(anchor) for anchor in (1, 0)]
    if None in found:
        return "too few cycles for a class"
    told = [f"{one.name} against cycle {one.anchor}{'' if one.settled else ', not settled'}" for one in found]
    return told[0] if found[0].name == found[1].name else "; ".join(told)


@in_house_style
def probability_figure(
    expected: Mapping[str, Sequence[float]],
    sampled: Mapping[str, Sequence[Sequence[float]]],
    *,
    base: float,
    title: str,
) -> Any:
    """Probability of the trait by cycle, a panel a setting, continual beside reinit."""
    names = [name.removesuffix(", continual") for name in expected if name.endswith("continual")]
    columns = min(3, len(names))
    size = (max(4.6, 3.3 * columns), 2.5 * math.ceil(len(names) / columns) + 1.1)
    figure, axes = panels(len(names), size=size, title=title, columns=columns, sharey=True)
    for name, axis in zip(names, axes, strict=True):
        for init, colour in zip(_INITS, (BLUE, ORANGE), strict=True):
            curve, chains = expected[f"{name}, {init}"], np.array(sampled[f"{name}, {init}"])
            band(axis, range(len(curve)), [t_interval(row) for row in chains.T.tolist()], colour, init, markersize=3)
            axis.plot(curve, color=colour, linestyle="--", linewidth=0.9, label=f"{init}, expected loss")
        axis.axhline(base, color=GREY, linestyle=":", label="base")
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.get_major_locator().set_params(integer=True)
        label(axis, "cycle", "probability", title=name)
    legend_below(figure, 4)
    return figure
