"""What a recipe's file imports; it lies in :mod:`lightning_interp.running`."""

from lightning_interp.running.recipe import Recipe, RecipeResult
from lightning_interp.running.run_folder import RunFolder

__all__ = ["Recipe", "RecipeResult", "RunFolder"]
