"""On-policy distillation: `distillation` and its `teacher`."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_lora.config.algorithm_section import RolloutSection
from megatron_lora.config.schema_base import NonNegativeInt, Place, PositiveFloat, PositiveInt, Section
from megatron_lora.config.schema_loss import OF_DISTILLATION, READ_BY_DISTILLATION, LossFnConfig, written_otherwise

if TYPE_CHECKING:
    from megatron_lora.config.schema import Recipe


class TeacherConfig(Section):
    """`teacher`: whose distribution the policy is to have. Without `adapter` and `urls`: the policy's base."""

    adapter: Place | None = Field(
        default=None, description="HF PEFT adapter folder: the teacher is the policy's own base with it."
    )
    urls: list[str] = Field(
        default_factory=list,
        description="vLLM servers of a teacher of its own, as http://host:port, with one tokenizer.",
    )
    model_name: str | None = Field(
        default=None, description="The name under which the servers have it; null: what each serves first."
    )
    timeout_seconds: PositiveFloat = Field(
        default=600.0, description="A server that takes longer to score an answer is left out."
    )
    requests_at_once: PositiveInt = Field(default=16, description="Answers that a server scores at once.")


class DistillationConfig(RolloutSection):
    """`distillation`: the policy's own answers, token by token nearer to the teacher."""

    own_sections = ("loss_fn", "env", "policy.generation", "teacher")

    num_generations_per_prompt: PositiveInt = Field(default=1, description="Answers a prompt.")
    topk_logits_k: NonNegativeInt | None = Field(
        default=None,
        description="Sum the divergence over the teacher's so many most likely tokens of each place; null or 0: "
        "estimate it from the token that was drawn.",
    )

    @property
    def num_candidates(self) -> int:
        """Tokens that the divergence is summed over; 0: it is estimated."""
        return self.topk_logits_k or 0

    def unread(self, name: str, resolved: dict[str, Any]) -> list[str]:
        """Keys of `loss_fn` that are for losses of rewards, where they say something else than the default."""
        read = OF_DISTILLATION if self.num_candidates else READ_BY_DISTILLATION
        return written_otherwise(resolved, [key for key in LossFnConfig.model_fields if key not in read])

    def complete(self, recipe: "Recipe") -> None:
        super().complete(recipe)
        self._check_divergence(recipe)
        teacher = recipe.teacher
        if teacher.adapter is not None and teacher.urls:
            raise ValueError(
                "teacher.adapter and teacher.urls name two teachers; keep one (set the other to null or [])"
            )
        if teacher.adapter is not None and not recipe.policy.adapter.enabled:
            raise ValueError(
                f"teacher.adapter={teacher.adapter} is on the policy's own base, which full fine-tuning changes; train "
                "an adapter, or give servers of the teacher (teacher.urls)"
            )
        of_servers = {"model_name", "timeout_seconds", "requests_at_once"} & teacher.model_fields_set
        changed = sorted(key for key in of_servers if getattr(teacher, key) != TeacherConfig.model_fields[key].default)
        if changed and not teacher.urls:
            raise ValueError(
                f"{', '.join(f'teacher.{key}' for key in changed)} are for teacher.urls, which is empty; name the "
                "servers"
            )

    def _check_divergence(self, recipe: "Recipe") -> None:
        loss, generation = recipe.loss_fn, recipe.policy.generation
        summed = self.num_candidates > 0
        if not summed and (loss.kl_type != "reverse" or loss.zero_outside_topk):
            key = f"kl_type={loss.kl_type}" if loss.kl_type != "reverse" else "zero_outside_topk=true"
            raise ValueError(
                f"loss_fn.{key} sums over the teacher's most likely tokens: say how many (distillation.topk_logits_k, "
                "such as 64), or leave it out"
            )
        if summed and (generation.top_p < 1 or (generation.top_k or -1) > 0):
            raise ValueError(
                f"distillation.topk_logits_k={self.topk_logits_k} with policy.generation.top_p={generation.top_p:g}, "
                f"top_k={generation.top_k}: tokens that are never drawn have no log-probability to compare; set "
                "top_p=1, top_k=null, or topk_logits_k=null"
            )

    def has_reference(self, recipe: "Recipe") -> bool:
        return recipe.teacher.adapter is None and not recipe.teacher.urls
