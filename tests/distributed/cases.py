"""What the tests of both backends ask of a worker: one `Case` a policy that is built and looked at."""

from dataclasses import dataclass, field
from typing import Any

from megatron_lora.data.batch import Row
from tests.support.models import SIZES
from tests.support.real_text import text_rows
from tests.support.reference import make_rows

VOCAB_SIZE = SIZES["vocab_size"]
SEED = 11
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP: dict[str, Any] = TP | {"sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP: dict[str, Any] = PP | {"virtual_pipeline_model_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}
ETP: dict[str, Any] = SP | {"expert_tensor_parallel_size": 2}
CP: dict[str, Any] = {"context_parallel_size": 2}
# Of the DTensor backend.
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
SP2: dict[str, Any] = TP2 | {"sequence_parallel": True}
FULL_RECOMPUTE: dict[str, Any] = {"activation_checkpointing": True}
PLAIN_LOGPROBS: dict[str, Any] = {"use_fused_linear_logprobs": False}

# Adam moves an entry whose gradient is nearly zero by a whole learning rate, in a direction that rounding decides: of
# gemma3's 26,624 entries one (layer 1, gate_proj's B) is lr / 15 away from transformers' after ten steps at any rate
# with eps 1e-8. It does so no more once eps is above the gradients' rounding (all entries within 1e-5 of the update),
# and with eps so large that a step is the gradient itself updates agree to 1e-6. Real weights round more (the residual
# of SmolLM2 reaches 25,000; in fp32 transformers is as far from fp64 as this project is), so there steps are gradients.
ADAM_EPS = {
    "gemma3": 1e-5,
    "gemma3_tower": 1e-5,
    "qwen3_5": 1e-5,
    "qwen3_5_even": 1e-5,
    "qwen3_next": 1e-5,
    "qwen3_5_moe": 1e-5,
    "nemotron_h": 1e-5,
    "gpt_oss": 1e-5,
    "gpt_oss_even": 1e-5,
    "deepseek_v3": 1e-5,
    "gemma3_softcap": 1e-5,
    "llama_biases": 1e-5,
    "smollm2": 1.0,
}
# Over 4-bit values some of DoRA's magnitudes have gradients near zero, too.
LEARNING_RATES = {
    "smollm2": 1.0,
    "gemma2": 2e-4,
    "qwen3_5": 2e-4,
    "qwen3_5_even": 2e-4,
    "qwen3_next": 2e-4,
    "qwen3_5_moe": 2e-4,
    "nemotron_h": 2e-4,
    "qwen3_even": 2e-3,
    "qwen3_even_nf4": 2e-3,
    "qwen3_moe_even": 2e-3,
    "qwen3_moe_even_nf4": 2e-3,
}


@dataclass(frozen=True)
class Case:
    """name: unique among all tests. ranks: processes. check: a function of `worker`. family: the base.
    adapter: an adapter folder of `conftest.room`, "drawn" for one that the policy starts, None for full fine-tuning.
    megatron, dtensor, policy: keys set in policy.megatron_cfg, policy.dtensor_cfg and policy; a case with `dtensor` is
    one of that backend, one with `both` builds policies of both. options: what the check itself wants to know. needs: a
    case of as many ranks or fewer that this one is compared with, or whose files it reads (of fewer)."""

    name: str
    ranks: int
    check: str
    family: str = "qwen3"
    adapter: str | None = "shared"
    megatron: dict[str, Any] = field(default_factory=dict)
    dtensor: dict[str, Any] | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    needs: "Case | None" = None
    both: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def backend(self) -> str:
        if self.both:
            return "both"
        return "megatron" if self.dtensor is None else "dtensor"

    @property
    def peft(self) -> dict[str, Any]:
        """The keys of its adapter."""
        return self.megatron.get("peft", {}) if self.dtensor is None else self.dtensor.get("lora_cfg", {})

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES.get(self.family, 1e-2)

    @property
    def adam_eps(self) -> float:
        return ADAM_EPS.get(self.family, 1e-8)


def case_rows(family: str, options: dict[str, Any]) -> list[list[Row]]:
    """The rows of each training step of a case. options: `steps`; of the real model also `rows`, `questions` a row."""
    steps = options.get("steps", 10)
    if family == "smollm2":
        count, questions = options.get("rows", 2), options.get("questions", 1)
        return [text_rows(count, seed=step, questions=questions) for step in range(steps)]
    return training_rows(steps)


def training_rows(num_steps: int = 10, first: int = 0) -> list[list[Row]]:
    """The rows of each training step; every process draws the same."""
    return [make_rows(6, VOCAB_SIZE, seed=step) for step in range(first, first + num_steps)]


def scored_rows() -> list[Row]:
    return make_rows(5, VOCAB_SIZE, seed=50)
