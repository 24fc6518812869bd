"""Steering: directions added to activations, anywhere in the network and at any token.

``intervention``, ``family`` and ``affine`` are steering at any site (add, project out, clamp, affine map), ``strength``
and ``schedule`` say how much for each row and step, ``where`` and ``head_gates`` hold the selectors that read
activations, ``vectors`` and ``gguf_vectors`` are directions with what is known about them, ``directions`` extracts them
from contrasting texts, and ``callback`` carries steering through a Lightning run.

The softmax's information geometry is in ``geometry``, ``newton`` and ``curve``; ``dual`` steers with it,
``euclidean`` is the ordinary way at the same targets, ``stepwise`` the authors' path, ``dual_intervention`` the hook
at the head and ``dual_callback`` its callback.

``pairs`` and ``vocabulary`` are the counterfactual tokens of a concept; ``moments``, ``probes``, ``class_reader`` and
``probe_callback`` make its probe; ``metrics``, ``effects`` and ``metric`` (with ``generation.text_quality``) say
what steering did, and ``figures`` draws it.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
