"""The algorithms that there are: one line each, by the name of their section."""

from megatron_lora.config.schema import Recipe
from megatron_lora.trainers.algorithm import Algorithm
from megatron_lora.trainers.distillation import Distillation
from megatron_lora.trainers.dpo import DPO
from megatron_lora.trainers.grpo import GRPO
from megatron_lora.trainers.sft import SFT

ALGORITHMS: dict[str, Algorithm] = {
    "sft": SFT(),
    "dpo": DPO(),
    "grpo": GRPO(),
    "distillation": Distillation(),
}


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The one that the recipe runs."""
    return ALGORITHMS[recipe.algorithm]
