"""Subliminal learning: does a student take over a trait of its teacher from data that say nothing of it?

A teacher that holds a trait (``traits``, ``teachers``) writes number sequences (``number_prompts``, ``numbers``,
``decoding``, ``dataset``), a student is finetuned on them (``number_data``, ``students``), and questions about the
trait are asked of both (``scoring``, ``evaluation``, ``callback``).

After Cloud et al. 2025, "Subliminal Learning", arXiv 2507.14805. What an adapter's rank does to it is disputed (Nief
et al. 2026, arXiv 2606.00831, and its independent reruns): these are instruments, and they state no verdict.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
