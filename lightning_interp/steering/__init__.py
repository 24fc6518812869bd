"""Steering: directions added to activations, anywhere in the network and at any token.

``intervention``, ``family`` and ``affine`` are steering at any site (add, project out, clamp, affine map), ``strength``
and ``schedule`` say how much for each row and step, ``where`` and ``head_gates`` hold the selectors that read
activations, ``vectors`` and ``gguf_vectors`` are directions with what is known about them, ``directions`` extracts them
from contrasting texts, and ``callback`` carries steering through a Lightning run.

The softmax's information geometry is in ``head``, ``geometry``, ``newton`` and ``curve``; ``dual`` steers with it,
``euclidean`` is the ordinary way at the same targets, ``stepwise`` the authors' path, ``dual_intervention`` the hook
at the head and ``dual_callback`` its callback.

``pairs`` and ``vocabulary`` are the counterfactual tokens of a concept; ``moments``, ``probes``, ``class_reader`` and
``probe_callback`` make its probe; ``metrics``, ``effects``, ``metric`` and ``text_quality`` say what steering did, and
``figures`` draws it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.steering.affine import AffineMap
    from lightning_interp.steering.callback import SteeringCallback
    from lightning_interp.steering.class_reader import ClassReader, PredictedSide
    from lightning_interp.steering.curve import DualCurve, SolverOptions
    from lightning_interp.steering.directions import METHODS, direction_between, extract_vector
    from lightning_interp.steering.dual import combine, dual_steer
    from lightning_interp.steering.dual_callback import DualSteeringCallback
    from lightning_interp.steering.dual_intervention import DualSteering, dual_steering
    from lightning_interp.steering.effects import SteeringResult
    from lightning_interp.steering.euclidean import euclidean_steer
    from lightning_interp.steering.family import ClampDirection, ProjectOut
    from lightning_interp.steering.features import text_features
    from lightning_interp.steering.figures import path_figure, steering_figure
    from lightning_interp.steering.fingerprint import check_fingerprint, model_fingerprint
    from lightning_interp.steering.geometry import SoftmaxGeometry
    from lightning_interp.steering.gguf_vectors import load_control_vector, save_control_vector
    from lightning_interp.steering.head import SoftmaxHead, read_head
    from lightning_interp.steering.head_gates import EntropyGate, PairMassGate
    from lightning_interp.steering.implicit import dual_step
    from lightning_interp.steering.intervention import AddDirection, Steering
    from lightning_interp.steering.meter import SteeringMeter
    from lightning_interp.steering.metric import SteeringMetrics
    from lightning_interp.steering.metrics import score_distributions, score_path
    from lightning_interp.steering.moments import ClassMoments
    from lightning_interp.steering.pairs import CounterfactualPairs
    from lightning_interp.steering.probe_callback import ProbeCallback
    from lightning_interp.steering.probes import ConceptProbe
    from lightning_interp.steering.request import Target
    from lightning_interp.steering.result import SteerResult
    from lightning_interp.steering.schedule import LinearDecay, Schedule, StepFactors, WarmUp
    from lightning_interp.steering.selectors import bind_positions, describe_positions
    from lightning_interp.steering.stepwise import StepwisePath, algorithm1
    from lightning_interp.steering.text_quality import perplexity, repetition
    from lightning_interp.steering.vectors import SteeringVector
    from lightning_interp.steering.vocabulary import pairs_from_vocabulary
    from lightning_interp.steering.where import Gate, ProbeGate

# One line a module; __all__ below and the imports above name the same things.
_MODULES: dict[str, tuple[str, ...]] = {
    "affine": ("AffineMap",),
    "callback": ("SteeringCallback",),
    "class_reader": ("ClassReader", "PredictedSide"),
    "curve": ("DualCurve", "SolverOptions"),
    "directions": ("METHODS", "direction_between", "extract_vector"),
    "dual": ("combine", "dual_steer"),
    "dual_callback": ("DualSteeringCallback",),
    "dual_intervention": ("DualSteering", "dual_steering"),
    "effects": ("SteeringResult",),
    "euclidean": ("euclidean_steer",),
    "family": ("ClampDirection", "ProjectOut"),
    "features": ("text_features",),
    "figures": ("path_figure", "steering_figure"),
    "fingerprint": ("check_fingerprint", "model_fingerprint"),
    "geometry": ("SoftmaxGeometry",),
    "gguf_vectors": ("load_control_vector", "save_control_vector"),
    "head": ("SoftmaxHead", "read_head"),
    "head_gates": ("EntropyGate", "PairMassGate"),
    "implicit": ("dual_step",),
    "intervention": ("AddDirection", "Steering"),
    "meter": ("SteeringMeter",),
    "metric": ("SteeringMetrics",),
    "metrics": ("score_distributions", "score_path"),
    "moments": ("ClassMoments",),
    "pairs": ("CounterfactualPairs",),
    "probe_callback": ("ProbeCallback",),
    "probes": ("ConceptProbe",),
    "request": ("Target",),
    "result": ("SteerResult",),
    "schedule": ("LinearDecay", "Schedule", "StepFactors", "WarmUp"),
    "selectors": ("bind_positions", "describe_positions"),
    "stepwise": ("StepwisePath", "algorithm1"),
    "text_quality": ("perplexity", "repetition"),
    "vectors": ("SteeringVector",),
    "vocabulary": ("pairs_from_vocabulary",),
    "where": ("Gate", "ProbeGate"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "METHODS",
    "AddDirection",
    "AffineMap",
    "ClampDirection",
    "ClassMoments",
    "ClassReader",
    "ConceptProbe",
    "CounterfactualPairs",
    "DualCurve",
    "DualSteering",
    "DualSteeringCallback",
    "EntropyGate",
    "Gate",
    "LinearDecay",
    "PairMassGate",
    "PredictedSide",
    "ProbeCallback",
    "ProbeGate",
    "ProjectOut",
    "Schedule",
    "SoftmaxGeometry",
    "SoftmaxHead",
    "SolverOptions",
    "SteerResult",
    "Steering",
    "SteeringCallback",
    "SteeringMeter",
    "SteeringMetrics",
    "SteeringResult",
    "SteeringVector",
    "StepFactors",
    "StepwisePath",
    "Target",
    "WarmUp",
    "algorithm1",
    "bind_positions",
    "check_fingerprint",
    "combine",
    "describe_positions",
    "direction_between",
    "dual_steer",
    "dual_steering",
    "dual_step",
    "euclidean_steer",
    "extract_vector",
    "load_control_vector",
    "model_fingerprint",
    "pairs_from_vocabulary",
    "path_figure",
    "perplexity",
    "read_head",
    "repetition",
    "save_control_vector",
    "score_distributions",
    "score_path",
    "steering_figure",
    "text_features",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
