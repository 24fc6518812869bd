"""Whether a steering vector belongs to the model that it is put on."""

from __future__ import annotations

import warnings
from typing import Literal

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.steering.vectors.reading import check_made_for
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = ["CheckModel", "check_vector_model"]

CheckModel = Literal["error", "warn", "off"]


def check_vector_model(vector: SteeringVector, model_map: ModelMap, choice: CheckModel, *, what: str) -> None:
    """Refuse a vector of another model, or warn of it, as ``choice`` says; ``what`` names the intervention.

    One without a fingerprint (from a control-vector file, or made by hand) is compared by its family alone, and only
    warned of, as such names differ between programs.
    """
    if choice == "off":
        return
    name, family = type(model_map.model).__name__, str(model_map.config_value("model_type", ""))
    if vector.fingerprint is None and vector.model_type and _plain(vector.model_type) != _plain(family):
        warnings.warn(
            f"{what}: {vector!r} says that it is for a model of type {vector.model_type!r}, but {name} is of type "
            f"{family!r}. Pass check_model='off' if they are the same.",
            stacklevel=2,
        )
    try:
        check_made_for(model_map, vector.fingerprint, what=repr(vector))
    except IncompatibleModelError as error:
        if choice == "error":
            raise IncompatibleModelError(
                f"{error} Where another finetuning of the same model is meant, pass {what}(check_model='warn')."
            ) from None
        warnings.warn(f"{what}: {error}", stacklevel=2)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
