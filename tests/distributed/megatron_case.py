"""What the tests of the Megatron policy ask of a worker: one `Case` a policy that is built and looked at."""

from dataclasses import dataclass, field
from typing import Any

from megatron_lora.data.batch import Row
from tests.support.models import SIZES
from tests.support.real_text import text_rows
from tests.support.reference import make_rows

VOCAB_SIZE = SIZES["vocab_size"]
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP: dict[str, Any] = TP | {"sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP: dict[str, Any] = PP | {"virtual_pipeline_model_parallel_size": 2}
CP: dict[str, Any] = {"context_parallel_size": 2}
FULL_RECOMPUTE: dict[str, Any] = {"activation_checkpointing": True}
PLAIN_LOGPROBS: dict[str, Any] = {"use_fused_linear_logprobs": False}

# A random Gemma 3 of this size has gradients near zero, whose sign decides Adam's first steps; so have biases of keys,
# which only rotary embeddings keep from cancelling in the softmax.
# Over 4-bit values some of DoRA's magnitudes have them, too.
LEARNING_RATES = {"qwen3_even": 2e-3, "qwen3_even_nf4": 2e-3} | {
    "gemma3": 2e-4,
    "gemma3_softcap": 2e-4,
    "llama_biases": 1e-4,
    "smollm2": 1e-4,
}


@dataclass(frozen=True)
class Case:
    """name: unique among all tests. ranks: processes. check: a function of `megatron_worker`. family: the base.
    adapter: an adapter folder of `conftest.room`, "drawn" for one that the policy starts, None for full fine-tuning.
    megatron, policy: keys set in policy.megatron_cfg and policy. options: what the check itself wants to know.
    needs: a case of fewer ranks whose files this one reads."""

    name: str
    ranks: int
    check: str
    family: str = "qwen3"
    adapter: str | None = "shared"
    megatron: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    needs: "Case | None" = None

    def __str__(self) -> str:
        return self.name

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES.get(self.family, 1e-2)


def case_rows(family: str, options: dict[str, Any]) -> list[list[Row]]:
    """The rows of each training step of a case. options: `steps`; of the real model `questions` a row, too."""
    steps = options.get("steps", 10)
    if family == "smollm2":
        return [text_rows(4, seed=step, questions=options.get("questions", 1)) for step in range(steps)]
    return training_rows(steps)


def training_rows(num_steps: int = 10, first: int = 0) -> list[list[Row]]:
    """The rows of each training step; every process draws the same."""
    return [make_rows(6, VOCAB_SIZE, seed=step) for step in range(first, first + num_steps)]


def scored_rows() -> list[Row]:
    return make_rows(5, VOCAB_SIZE, seed=50)
