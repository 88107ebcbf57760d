"""The recipe: every key that this project implements, with its type, default and meaning."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_algorithms import DpoConfig, GrpoConfig, LossFnConfig, SftConfig
from megatron_lora.config.schema_base import Section
from megatron_lora.config.schema_data import DataConfig
from megatron_lora.config.schema_env import EnvConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.config.schema_run import CheckpointingConfig, LoggerConfig, TimeoutsConfig

Algorithm = Literal["sft", "dpo", "grpo"]
ALGORITHMS: tuple[Algorithm, ...] = ("sft", "dpo", "grpo")


class Recipe(Section):
    """A complete recipe. It has exactly one of the sections `sft`, `dpo`, `grpo`: the algorithm."""

    sft: SftConfig | None = Field(default=None, description="Supervised fine-tuning.")
    dpo: DpoConfig | None = Field(default=None, description="Direct preference optimization.")
    grpo: GrpoConfig | None = Field(default=None, description="Group relative policy optimization.")
    loss_fn: LossFnConfig = Field(default_factory=LossFnConfig, description="GRPO's loss.")
    env: EnvConfig = Field(default_factory=EnvConfig, description="GRPO's rewards.")
    policy: PolicyConfig = Field(description="The model and how it is trained.")
    data: DataConfig = Field(description="The rows.")
    checkpointing: CheckpointingConfig = Field(default_factory=CheckpointingConfig, description="Checkpoints.")
    timeouts: TimeoutsConfig = Field(
        default_factory=TimeoutsConfig, description="When a rank that does not answer ends the run."
    )
    logger: LoggerConfig = Field(default_factory=LoggerConfig, description="Where metrics go.")

    @model_validator(mode="after")
    def _one_algorithm(self) -> Self:
        present = [name for name in ALGORITHMS if getattr(self, name) is not None]
        if not present:
            raise ValueError("the recipe has none of the sections sft, dpo, grpo; add the one to run")
        if len(present) > 1:
            raise ValueError(f"the recipe has the sections {' and '.join(present)}; keep one (set others to null)")
        return self

    @model_validator(mode="after")
    def _fill_and_check(self) -> Self:
        limit = self.policy.max_total_sequence_length
        if self.grpo is None:
            self.data.max_input_seq_length = None  # the loader has named it as without effect
        else:
            self.data.max_input_seq_length = self.data.max_input_seq_length or limit
            shaping = self.grpo.reward_shaping
            shaping.max_response_length = shaping.max_response_length or limit
            if shaping.enabled and shaping.overlong_buffer_length > shaping.max_response_length:
                raise ValueError(
                    f"grpo.reward_shaping.overlong_buffer_length={shaping.overlong_buffer_length} is above "
                    f"grpo.reward_shaping.max_response_length={shaping.max_response_length}; lower it"
                )
            self._check_rollout_batch(self.grpo)
            self._leave_room_for_the_engine()
            if self.grpo.adv_estimator.name == "dr_grpo" and self.loss_fn.length_normalization:
                raise ValueError(
                    "grpo.adv_estimator.name=dr_grpo is one half of Dr. GRPO, the other is a loss that is not divided "
                    "by answers' lengths: set loss_fn.length_normalization=false (the advantage alone is name=grpo "
                    "with normalize_rewards=false and use_leave_one_out_baseline=false)"
                )
        return self

    def _leave_room_for_the_engine(self) -> None:
        """CUDA graphs keep the memory of a micro-batch's activations, which an engine that wakes wants back."""
        generation, megatron = self.policy.generation, self.policy.megatron_cfg
        if generation.backend == "vllm" and generation.colocated.enabled:
            megatron.cuda_graph_impl = megatron.cuda_graph_impl or "none"

    def _check_rollout_batch(self, grpo: GrpoConfig) -> None:
        samples = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
        batch = self.policy.train_global_batch_size
        if samples % batch:
            raise ValueError(
                f"policy.train_global_batch_size={batch} does not divide the {samples} samples of a rollout step "
                f"(grpo.num_prompts_per_step={grpo.num_prompts_per_step} x "
                f"grpo.num_generations_per_prompt={grpo.num_generations_per_prompt}); use {samples} for one optimizer "
                "step a rollout, or a divisor of it for several"
            )

        updates = samples // batch
        if updates > 1 and self.loss_fn.force_on_policy_ratio:
            raise ValueError(
                "loss_fn.force_on_policy_ratio=true takes every update as the first, but "
                f"policy.train_global_batch_size={batch} makes {updates} of a step's {samples} samples; use "
                f"{samples}, or set it to false"
            )

    @property
    def algorithm(self) -> Algorithm:
        """The section that the recipe has."""
        return next(name for name in ALGORITHMS if getattr(self, name) is not None)

    @property
    def seed(self) -> int:
        """The algorithm's seed."""
        section = self.sft or self.dpo or self.grpo
        assert section is not None
        return section.seed

    @property
    def has_reference(self) -> bool:
        """Whether the objective reads a reference policy."""
        return self.dpo is not None or (self.grpo is not None and self.loss_fn.reference_policy_kl_penalty > 0)

    @property
    def keeps_start(self) -> bool:
        """Whether full fine-tuning has to keep the weights that it started from: they are the reference, and it is
        asked after the first update."""
        ahead = self.dpo is not None and self.dpo.precompute_reference_logprobs
        return self.has_reference and not self.policy.adapter.enabled and not ahead
