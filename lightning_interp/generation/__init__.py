"""Text that models write, for every method: one request, one answer, one store, whoever writes.

``requests`` says what is asked for and what comes back. ``sampler`` (a model on this machine), ``endpoint`` (a server
that speaks OpenAI's protocol; ``serving`` gives it adapters) and any function write. ``work`` and ``completion_store``
fill a folder that a killed run goes on with, ``shards`` one that has the same bytes whenever it is written,
``batch_files`` sends requests away in files. ``hygiene`` says which texts to keep, ``judges`` and ``labellers`` what a
text is like, ``text_quality`` whether it repeats itself.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
