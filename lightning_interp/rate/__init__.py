"""Rewrite-based attribute treatment effects: how much a reward changes because of one attribute of a text.

A text is rewritten twice, to flip the attribute and to flip it back, and the two rewrites are compared: what the
rewriter does in either direction cancels. ``estimators`` makes effects of three rewards a unit, ``checks`` asks whether
the assumptions hold, ``report`` writes studies and figures, ``scoring`` asks for rewards, and ``callback`` watches the
effect while a reward model trains.

The name is that of Reber et al., "RATE: Causal Explainability of Reward Models with Imperfect Counterfactuals",
arXiv 2410.11348; it has nothing to do with the rank-weighted average treatment effect.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
