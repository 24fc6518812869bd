"""Generation cycles: each model is trained on what the model before it wrote. Does a trait grow, hold or fade?

Chains of models (``loop``, ``writing``, ``phases``, ``chain_rows``, ``chain_settings``), what is asked of each
(``evaluation``, ``callback``), what became of a trait (``trajectory``, ``chain_report``), and a model of one parameter
that says what to expect (``one_parameter``). How much seed gives a trait is searched by ``core.measure.dose_search``.

After Roe et al. 2026, "Iterative Finetuning is Mostly Idempotent", arXiv 2605.01130.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
