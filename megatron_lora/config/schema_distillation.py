"""On-policy distillation: `distillation` and its `teacher`."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_lora.config.algorithm_section import RolloutSection
from megatron_lora.config.schema_base import Place, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from megatron_lora.config.schema import Recipe

# Of `loss_fn`; the rest is for losses that have rewards.
READ = ("ratio_clip_min", "ratio_clip_max", "ratio_clip_c")


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

    def unread(self, name: str, resolved: dict[str, Any]) -> list[str]:
        """Keys of `loss_fn` that are for losses of rewards, where they say something else than the default."""
        from megatron_lora.config.schema_algorithms import LossFnConfig

        written, fields = resolved.get("loss_fn") or {}, LossFnConfig.model_fields
        return [
            f"loss_fn.{key}"
            for key, value in written.items()
            if key in fields and key not in READ and value != fields[key].get_default(call_default_factory=True)
        ]

    def complete(self, recipe: "Recipe") -> None:
        super().complete(recipe)
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

    def has_reference(self, recipe: "Recipe") -> bool:
        return recipe.teacher.adapter is None and not recipe.teacher.urls
