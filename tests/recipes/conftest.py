"""Tests import the helpers of recipes under the name by which the recipes do."""

from lightning_interp.running.catalog import recipe_module

recipe_module("grafting/_common")  # makes the package lightning_interp_recipes known
