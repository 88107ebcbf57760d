"""What a section of an algorithm is: the keys that all have, and what the rest of the recipe asks of one.

A new algorithm is a section here (with a field in `schema.Recipe`) and an object in `trainers/algorithms.py`; nothing
else knows the algorithms' names.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_base import Float, Int, Period, PositiveInt, Section, Seed

if TYPE_CHECKING:
    from megatron_lora.config.schema import Recipe

RowKind = Literal["conversations", "pairs", "prompts"]


class AlgorithmSection(Section):
    """Keys of every loop.

    rows: what its data are, and so how they are read (`data/forms.py`). own_sections: those of the recipe, besides its
    own, that its runs read and others need not (dotted paths). beta_key: where the weight of its KL term stands.
    """

    rows: ClassVar[RowKind]
    own_sections: ClassVar[tuple[str, ...]] = ()
    beta_key: ClassVar[str] = ""

    max_num_epochs: PositiveInt = Field(default=1, description="Passes over the training rows, at most.")
    max_num_steps: PositiveInt = Field(default=60, description="Optimizer steps (GRPO: rollout steps), at most.")
    seed: Seed = Field(default=42, description="Seed of data order, adapters, dropout and sampling.")
    val_period: Period = Field(default=10, description="Steps between validations; 0 or -1: none.")
    val_at_start: bool = Field(default=False, description="Validate before the first step.")
    val_at_end: bool = Field(default=False, description="Validate after the last step.")

    def complete(self, recipe: "Recipe") -> None:
        """Fill in what other sections decide, and check them against this one. Raises ValueError."""

    def unread(self, name: str, resolved: dict[str, Any]) -> list[str]:
        """Dotted keys that were written and that no run looks at. name: this section's. resolved: the whole recipe as
        it was written."""
        return []

    def notices(self, resolved: dict[str, Any]) -> list[str]:
        """Of the keys without effect those that ask for another run than the user gets. resolved: the whole recipe."""
        return []

    def has_reference(self, recipe: "Recipe") -> bool:
        """Whether the objective reads a reference policy."""
        return False

    @property
    def scores_reference_ahead(self) -> bool:
        """Whether the reference is asked before the first update alone."""
        return False

    @property
    def trains_critic(self) -> bool:
        """Whether advantages are taken from a value function that trains beside the policy."""
        return False

    @property
    def final_answer_only(self) -> bool:
        """Whether of a conversation only the last answer carries loss."""
        return False


class SupervisedSection(AlgorithmSection):
    """Of algorithms that train on answers which their data hold."""

    val_batches: Int = Field(default=8, description="Global batches a validation; -1 or 0: all.")
    val_global_batch_size: PositiveInt = Field(default=32, description="Rows (DPO: pairs) a validation batch.")


class RolloutSection(AlgorithmSection):
    """Of algorithms that train on answers which the policy draws."""

    rows = "prompts"
    own_sections = ("loss_fn", "env", "policy.generation")

    max_num_steps: PositiveInt = Field(default=1000000, description="Rollout steps, at most.")
    num_prompts_per_step: PositiveInt = Field(default=32, description="Prompts a rollout step.")
    num_generations_per_prompt: PositiveInt = Field(default=16, description="Answers a prompt: the group.")
    max_rollout_turns: PositiveInt = Field(
        default=1, description="Turns that the model has in an answer, at most; `env.environment` answers between them."
    )
    max_val_samples: PositiveInt = Field(default=256, description="Prompts a validation, at most.")
    val_batch_size: PositiveInt = Field(default=256, description="Prompts generated at once at validation.")
    val_num_generations_per_prompt: PositiveInt = Field(
        default=1,
        description="Answers a prompt at validation; above 1 it logs `pass_k`, the share of prompts with a right one.",
    )
    val_start_at: Int = Field(default=-1, description="First step at which `val_period` applies; -1: from the first.")
    stop_at_validation_metric: str | None = Field(
        default=None, description="Metric of validation, such as `accuracy`, that ends the run; null: none does."
    )
    stop_at_validation_threshold: Float | None = Field(
        default=None, description="It ends where the metric is at least this."
    )

    @property
    def num_samples(self) -> int:
        """Answers a step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    @property
    def prompts_a_batch(self) -> int:
        """Prompts that are answered at once; a step takes one such batch or more."""
        return self.num_prompts_per_step

    @property
    def oldest_answer(self) -> int:
        """Versions that an answer may be behind the weights which it trains; -1: none are asked for ahead."""
        return -1

    @property
    def in_flight(self) -> bool:
        """Whether an engine is handed new weights while answers of older ones are drawn."""
        return False

    @property
    def num_versions(self) -> int:
        """Versions of the weights that answer at a time."""
        return 1 + (self.oldest_answer if self.in_flight else 0)

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        if (self.stop_at_validation_metric is None) != (self.stop_at_validation_threshold is None):
            raise ValueError(
                "stop_at_validation_metric and stop_at_validation_threshold belong together; set both or neither"
            )
        if self.stop_at_validation_metric == "pass_k" and self.val_num_generations_per_prompt == 1:
            raise ValueError(
                "stop_at_validation_metric=pass_k needs several answers a prompt; set val_num_generations_per_prompt"
            )
        return self

    def complete(self, recipe: "Recipe") -> None:
        limit = recipe.policy.max_total_sequence_length
        recipe.data.max_input_seq_length = recipe.data.max_input_seq_length or limit
        samples, batch, own = self.num_samples, recipe.policy.train_global_batch_size, recipe.algorithm
        if samples % batch:
            raise ValueError(
                f"policy.train_global_batch_size={batch} does not divide the {samples} samples of a rollout step "
                f"({own}.num_prompts_per_step={self.num_prompts_per_step} x "
                f"{own}.num_generations_per_prompt={self.num_generations_per_prompt}); use {samples} for one optimizer "
                "step a rollout, or a divisor of it for several"
            )
        megatron = recipe.policy.megatron_cfg
        if recipe.policy.generation.engine.wants_memory:
            # CUDA graphs keep the memory of a micro-batch's activations, which an engine that wakes wants back.
            megatron.cuda_graph_impl = megatron.cuda_graph_impl or "none"
