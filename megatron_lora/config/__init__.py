"""Recipes: schema, loading, checks against a model's shapes. Imports no torch."""

from megatron_lora.config.loader import LoadedRecipe, check_recipe, dump_recipe, load_recipe, to_dict
from megatron_lora.config.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "check_recipe", "dump_recipe", "load_recipe", "to_dict"]
