"""A policy of one parameter through the cycles: it shows the trait or does not, and is trained on what it did.

The policy shows the trait with probability ``p = sigmoid(theta)``, the base with ``q``. Finetuning on own outputs
lowers the cross-entropy to ``p`` of the cycle before: its optimum is where the policy was. Preferring own outputs to
the base's lowers ``p (1-q) softplus(-beta d) + (1-p) q softplus(beta d)``, with ``d`` the way from the reference in
log-odds: its optimum is ``1 / beta`` times the policy's distance from the base. No language model is like this; it says
what a trainer would do that did nothing but lower its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import RecipeError

__all__ = ["OneParameter", "gain_near_base", "one_parameter_chains"]

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OneParameter:
    """How a policy of one parameter is trained in each cycle.

    Args:
        setting: ``sft``, or ``dpo`` with own outputs chosen and the base's rejected.
        init: Where a cycle starts: at the base (``reinit``) or where the last one ended (``continual``). The reference
            of ``dpo`` is that start.
        steps: Of plain gradient descent a cycle; None for the optimum itself.
        lr: Of gradient descent.
        beta: Of ``dpo``.
        base: How often the base shows the trait, ``q``.
        start: How often the model of cycle 0 does.
        cycles: Models, that of cycle 0 included.

    Raises:
        RecipeError: If a value makes no sense; the message names it.
    """

    setting: Literal["sft", "dpo"] = "dpo"
    init: Literal["reinit", "continual"] = "continual"
    steps: int | None = 50
    lr: float = 1.0
    beta: float = 0.1
    base: float = 0.1
    start: float = 0.3
    cycles: int = 7

    def __post_init__(self) -> None:
        wrong = {
            "setting": self.setting not in ("sft", "dpo"),
            "init": self.init not in ("reinit", "continual"),
            "steps": self.steps is not None and self.steps < 1,
            "lr": not 0 < self.lr < math.inf,
            "beta": not 0 < self.beta < math.inf,
            "base": not 0 < self.base < 1,
            "start": not 0 < self.start < 1,
            "cycles": self.cycles < 1,
        }
        for name, bad in wrong.items():
            if bad:
                raise RecipeError(
                    f"OneParameter({name}={getattr(self, name)!r}): expected sft or dpo, reinit or continual, positive "
                    "steps (None for the optimum), lr, beta and cycles, and probabilities between 0 and 1."
                )


def one_parameter_chains(
    settings: OneParameter, *, samples: int | None = None, chains: int = 1, seed: int = 0
) -> Values:
    """Follow policies of one parameter over the cycles.

    Args:
        settings: How they are trained.
        samples: Outputs (or pairs of outputs) that a cycle is trained on; None for the expected loss, of infinitely
            many.
        chains: Independent chains; without ``samples`` they are all alike.
        seed: Of the outputs.

    Returns:
        Probability of the trait after each cycle, float64 ``[chains, cycles]``.

    Raises:
        RecipeError: If a number is below 1, or the optimum of ``dpo`` is asked of samples: it lies at infinity as soon
            as pairs with one outcome are missing.

    Example:
        >>> one_parameter_chains(OneParameter(setting="dpo", init="continual", lr=2, cycles=4)).round(3).tolist()
        [[0.3, 0.528, 0.893, 0.997]]
        >>> one_parameter_chains(OneParameter(setting="sft", init="continual", cycles=3)).round(3).tolist()
        [[0.3, 0.3, 0.3]]
    """
    if chains < 1 or (samples is not None and samples < 1):
        raise RecipeError(f"one_parameter_chains(samples={samples}, chains={chains}): expected 1 or more of each.")
    if samples is not None and settings.setting == "dpo" and settings.steps is None:
        raise RecipeError(
            f"one_parameter_chains(samples={samples}) of dpo with steps=None: the optimum of finitely many pairs may "
            "lie at infinity. Give it a number of steps, or leave samples out."
        )
    from scipy.special import expit, logit

    base, theta = float(logit(settings.base)), np.full(chains, float(logit(settings.start)))
    found = [np.full(chains, settings.start)]
    for cycle in range(1, settings.cycles):
        random = np.random.default_rng(derived_seed(seed, "one parameter", cycle))
        start = theta if settings.init == "continual" else np.full(chains, base)
        trained = _sft if settings.setting == "sft" else _dpo
        theta = trained(found[-1], start, settings, samples, random)
        found.append(expit(theta))
    return np.stack(found, axis=1)


def _sft(p: Values, theta: Values, how: OneParameter, samples: int | None, random: np.random.Generator) -> Values:
    """Log-odds after a cycle on outputs of a policy that shows the trait with probability ``p``."""
    from scipy.special import expit, logit

    wanted = p if samples is None else random.binomial(samples, p) / samples
    if how.steps is None:
        optimum: Values = logit(wanted)
        return optimum
    for _ in range(how.steps):
        theta = theta - how.lr * (expit(theta) - wanted)
    return theta


def _dpo(p: Values, theta: Values, how: OneParameter, samples: int | None, random: np.random.Generator) -> Values:
    """Likewise on pairs; ``up`` and ``down`` are the shares in which the chosen or the rejected one has the trait."""
    from scipy.special import expit

    up, down = p * (1 - how.base), (1 - p) * how.base
    if how.steps is None:
        optimum: Values = theta + np.log(up / down) / how.beta
        return optimum
    if samples is not None:
        drawn = random.multinomial(samples, np.stack([up, down, 1 - up - down], axis=-1))
        up, down = (drawn[:, i] / samples for i in (0, 1))
    d = np.zeros_like(theta)
    for _ in range(how.steps):
        d = d + how.lr * how.beta * (up * expit(-how.beta * d) - down * expit(how.beta * d))
    return theta + d


def gain_near_base(settings: OneParameter) -> float:
    """What a cycle multiplies a small distance from the base by, in log-odds: above 1 the trait grows, below it fades.

    Gradient descent is linear there, so that the gain is a geometric sum of its steps: ``1 - (1 - lr q (1-q))^steps``
    for ``sft``, ``(1 - (1 - lr beta^2 q (1-q) / 2)^steps) / beta`` for ``dpo``. This is of ``reinit``; in
    ``continual`` cycles it is 1 for ``sft``, which starts at its optimum, and 1 more for ``dpo``.

    Args:
        settings: How a cycle is trained.

    Returns:
        The gain.

    Example:
        >>> [gain_near_base(OneParameter(init=init, steps=None, beta=0.5)) for init in ("reinit", "continual")]
        [2.0, 3.0]
        >>> gain_near_base(OneParameter(setting="sft", init="continual"))
        1.0
    """
    spread, continual = settings.base * (1 - settings.base), settings.init == "continual"
    if settings.setting == "sft":
        left = 0.0 if settings.steps is None else (1 - settings.lr * spread) ** settings.steps
        return 1.0 if continual else 1 - left
    left = 0.0 if settings.steps is None else (1 - settings.lr * settings.beta**2 * spread / 2) ** settings.steps
    return (1 - left) / settings.beta + continual
