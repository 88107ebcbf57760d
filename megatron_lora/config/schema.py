"""The recipe: every key that this project implements, with its type, default and meaning."""

from typing import Any, Self

from pydantic import Field, model_validator

from megatron_lora.config.algorithm_section import AlgorithmSection, RolloutSection
from megatron_lora.config.schema_algorithms import DpoConfig, GrpoConfig, SftConfig
from megatron_lora.config.schema_base import Section
from megatron_lora.config.schema_critic import CriticConfig
from megatron_lora.config.schema_data import DataConfig
from megatron_lora.config.schema_distillation import DistillationConfig, TeacherConfig
from megatron_lora.config.schema_env import EnvConfig
from megatron_lora.config.schema_loss import LossFnConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.config.schema_run import CheckpointingConfig, LoggerConfig, TimeoutsConfig
from megatron_lora.config.schema_tree import section_of


class Recipe(Section):
    """A complete recipe. It has exactly one section of an algorithm (`ALGORITHMS`)."""

    sft: SftConfig | None = Field(default=None, description="Supervised fine-tuning.")
    dpo: DpoConfig | None = Field(default=None, description="Direct preference optimization.")
    grpo: GrpoConfig | None = Field(default=None, description="Group relative policy optimization.")
    distillation: DistillationConfig | None = Field(default=None, description="On-policy distillation.")
    loss_fn: LossFnConfig = Field(default_factory=LossFnConfig, description="The loss on answers that were drawn.")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="Distillation's teacher.")
    critic: CriticConfig | None = Field(
        default=None, description="PPO's value function (`grpo.adv_estimator.name: gae`)."
    )
    env: EnvConfig = Field(default_factory=EnvConfig, description="GRPO's rewards.")
    policy: PolicyConfig = Field(description="The model and how it is trained.")
    data: DataConfig = Field(description="The rows.")
    checkpointing: CheckpointingConfig = Field(default_factory=CheckpointingConfig, description="Checkpoints.")
    timeouts: TimeoutsConfig = Field(
        default_factory=TimeoutsConfig, description="When a rank that does not answer ends the run."
    )
    logger: LoggerConfig = Field(default_factory=LoggerConfig, description="Where metrics go.")

    @model_validator(mode="before")
    @classmethod
    def _not_several_algorithms(cls, recipe: Any) -> Any:
        """Before all else: which key was meant depends on the algorithm."""
        present = [name for name in ALGORITHMS if isinstance(recipe, dict) and recipe.get(name) is not None]
        if len(present) > 1:
            raise ValueError(f"the recipe has the sections {' and '.join(present)}; keep one (set others to null)")
        return recipe

    @model_validator(mode="after")
    def _has_an_algorithm(self) -> Self:
        if all(getattr(self, name) is None for name in ALGORITHMS):
            raise ValueError(f"the recipe has none of the sections {', '.join(ALGORITHMS)}; add the one to run")
        return self

    @model_validator(mode="after")
    def _fill_and_check(self) -> Self:
        if self.section.rows != "prompts":
            self.data.max_input_seq_length = None  # the loader has named it as without effect
        self.section.complete(self)
        return self

    @model_validator(mode="after")
    def _check_critic(self) -> Self:
        if self.section.trains_critic and self.critic is None:
            raise ValueError(
                "grpo.adv_estimator.name=gae (PPO) takes advantages from a critic, and the recipe has no section "
                "critic; add critic.optim.lr (such as 1e-5), or name another estimator"
            )
        if self.critic is None:
            return self
        if not self.section.trains_critic:
            raise ValueError(
                "the recipe has a section critic, which nothing trains: set grpo.adv_estimator.name=gae (PPO), or "
                "critic=null"
            )
        adapter, section = self.policy.adapter, self.policy.adapter_section
        wanted = "name an estimator without a critic: a critic is an adapter on the policy's frozen base"
        if not adapter.enabled:
            raise ValueError(f"{section}.enabled=false trains the whole model; set it to true, or {wanted}")
        if adapter.modules_to_save:
            raise ValueError(
                f"{section}.modules_to_save={adapter.modules_to_save} trains parts of the base; set it to [], or "
                f"{wanted}"
            )
        return self

    @model_validator(mode="after")
    def _check_router_replay(self) -> Self:
        if self.policy.router_replay.enabled and not self.draws_answers:
            raise ValueError(
                "policy.router_replay.enabled=true follows the experts of a rollout engine, and "
                f"{self.algorithm} draws no answers; set it to false"
            )
        return self

    @property
    def algorithm(self) -> str:
        """The name of the section that the recipe has."""
        return next(name for name in ALGORITHMS if getattr(self, name) is not None)

    @property
    def section(self) -> AlgorithmSection:
        """The algorithm's section."""
        return getattr(self, self.algorithm)

    @property
    def rollouts(self) -> RolloutSection:
        """The section of an algorithm that draws answers; asked for such alone."""
        assert isinstance(self.section, RolloutSection)
        return self.section

    @property
    def draws_answers(self) -> bool:
        """Whether the policy draws the answers that it trains on."""
        return isinstance(self.section, RolloutSection)

    @property
    def seed(self) -> int:
        """The algorithm's seed."""
        return self.section.seed

    @property
    def has_reference(self) -> bool:
        """Whether the objective reads a reference policy."""
        return self.section.has_reference(self)

    @property
    def keeps_start(self) -> bool:
        """Whether full fine-tuning has to keep the weights that it started from: they are the reference, and it is
        asked after the first update."""
        return self.has_reference and not self.policy.adapter.enabled and not self.section.scores_reference_ahead


def _sections() -> dict[str, type[AlgorithmSection]]:
    found = ((name, section_of(field.annotation)) for name, field in Recipe.model_fields.items())
    return {name: section for name, section in found if section is not None and issubclass(section, AlgorithmSection)}


ALGORITHMS: dict[str, type[AlgorithmSection]] = _sections()
"""Name -> section of every algorithm that there is."""
