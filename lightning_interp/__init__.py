"""Ask what finetuning did to a language model: parts that plug into any PyTorch Lightning project.

The names below are imported when they are first used, so that ``import lightning_interp`` costs nothing; the rest
of the package is found under ``core`` (where, which tokens, hooks), ``models``, and one sub-package a method.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__, "__version__")
