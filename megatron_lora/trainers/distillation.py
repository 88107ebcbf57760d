"""On-policy distillation (Agarwal et al. 2024, GKD; Gu et al. 2024, MiniLLM): the policy answers, a teacher says how
likely it finds each token, and the policy is moved towards the teacher's distribution on its own answers.

The teacher is the policy's own base with another adapter (`teacher.adapter`; no second model), that base alone, or a
model of its own on vLLM servers (`teacher.urls`). Rewards are computed and logged; they teach nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_distillation import DistillationConfig
from megatron_lora.data.batch import Row
from megatron_lora.errors import UserError
from megatron_lora.objectives.base import Objective
from megatron_lora.objectives.distillation import (
    CANDIDATE_LOGPS,
    CANDIDATES,
    OLD,
    TEACHER,
    CandidatesObjective,
    DistillationObjective,
)
from megatron_lora.policy.heads import MostLikely
from megatron_lora.policy.interface import StepResult
from megatron_lora.policy.other_adapter import other_adapter
from megatron_lora.policy.weights_check import read_base
from megatron_lora.rollout.teacher import TeacherServers
from megatron_lora.runtime.agreement import from_first_rank
from megatron_lora.runtime.world import World
from megatron_lora.trainers.algorithm import Loader
from megatron_lora.trainers.rollout_algorithm import RolloutAlgorithm
from megatron_lora.trainers.rollout_batch import Group, build_rows
from megatron_lora.trainers.rollout_loop import RolloutTrainer, train_on_rollouts
from megatron_lora.trainers.rollout_scores import with_field, with_scores
from megatron_lora.trainers.session import Session

# Texts on which the teacher's tokenizer is compared with the policy's.
COMPARED_TEXTS = 8
METRICS = ("teacher_kl", "teacher_kl_k3", "teacher_nll")
ESTIMATED, SUMMED = ("clip_fraction",), ("forward_kl", "reverse_kl", "teacher_candidate_mass")


class DistillationTrainer(RolloutTrainer):
    """Steps of on-policy distillation."""

    def prepare(self) -> None:
        recipe, teacher = self.session.recipe, self.session.recipe.teacher
        self.adapter = teacher.adapter
        self.num_candidates = _section(recipe).num_candidates
        self.servers: TeacherServers | None = None
        if teacher.adapter is not None:
            self.policy.keep_other(other_adapter(recipe.policy, teacher.adapter, "teacher.adapter"))
        elif teacher.urls:
            self.servers = teacher_servers(recipe)
            rows = self.loader.dataset
            texts = [rows[number].text for number in range(min(COMPARED_TEXTS, len(rows)))]
            servers = self.servers
            from_first_rank(self.session.world, lambda: servers.start(self.session.tokenizer, texts))

    def score(self, groups: list[Group]) -> tuple[list[Row], dict[str, float]]:
        """Rows with the teacher's log-probabilities, and the policy's own where an update does not compute them."""
        size = self.rollouts.num_generations_per_prompt
        rows = build_rows(groups, torch.zeros(len(groups), size, dtype=torch.float64))
        adapter = self.session.recipe.policy.adapter
        drops = adapter.enabled and adapter.dropout > 0
        first_update = self.session.recipe.policy.train_global_batch_size
        with self.sampling():
            if self.servers is None:
                # A teacher chooses its own experts, whatever the policy's rollout engine chose.
                asked = [replace(row, routed_experts=None) for row in rows]
                with self.policy.other() if self.adapter is not None else self.policy.reference():
                    teacher = self._teacher(asked)
            rows = with_scores(self.policy, rows, old_from=0 if drops else first_update, reference=False)
        if self.servers is not None:
            servers = self.servers
            teacher = from_first_rank(
                self.session.world, lambda: servers.score([row.input_ids.tolist() for row in rows])
            )
        if not self.num_candidates:
            return with_field(rows, TEACHER, teacher), {}
        parts = [MostLikely(self.num_candidates).parts(values) for values in teacher]
        for name, values in zip((TEACHER, CANDIDATE_LOGPS, CANDIDATES), zip(*parts, strict=True), strict=True):
            rows = with_field(rows, name, values)
        return rows, {}

    def _teacher(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """What the model says of the rows, as `TeacherServers.score` does."""
        return (
            self.policy.forward(rows, MostLikely(self.num_candidates))
            if self.num_candidates
            else self.policy.score(rows)
        )

    def teaches(self, rows: Sequence[Row]) -> bool:
        """Not where the policy still is its teacher: what tells them apart then is rounding."""
        if not any(row.num_targets for row in rows):
            return False
        return self.servers is not None or self.adapter is not None or not self.policy.at_reference()

    def update_on(self, rows: list[Row], *, on_policy: bool) -> StepResult:
        loss = self.session.recipe.loss_fn
        objective: Objective
        if self.num_candidates:
            objective = CandidatesObjective.of(loss.kl_type, loss.mixed_kl_weight, whole=loss.zero_outside_topk)
        else:
            objective = DistillationObjective(loss.ratio_clip_min, loss.ratio_clip_max, loss.ratio_clip_c, on_policy)
        return self.policy.train_step([[row] for row in rows], objective, keep_logps=OLD not in rows[0].token_fields)


def teacher_servers(recipe: Recipe) -> TeacherServers:
    teacher, longest = recipe.teacher, recipe.policy.max_total_sequence_length
    return TeacherServers(
        teacher.urls,
        teacher.model_name,
        teacher.timeout_seconds,
        teacher.requests_at_once,
        longest,
        num_candidates=_section(recipe).num_candidates,
    )


def _section(recipe: Recipe) -> DistillationConfig:
    assert recipe.distillation is not None
    return recipe.distillation


class Distillation(RolloutAlgorithm):
    """The algorithm of the section `distillation`."""

    def check(self, recipe: Recipe, world: World) -> None:
        teacher, policy = recipe.teacher, recipe.policy
        if teacher.adapter is not None:
            other_adapter(policy, teacher.adapter, "teacher.adapter")
        elif not teacher.urls and (policy.adapter.init_adapter is None or policy.reference_policy != "base"):
            raise UserError(
                "the recipe names no teacher: set teacher.adapter (an adapter on the policy's base) or teacher.urls "
                "(servers of another model). The base alone can teach where the run starts from another place: with "
                "init_adapter and policy.reference_policy=base"
            )
        generation = policy.generation
        if teacher.urls and (generation.temperature, generation.top_p, generation.top_k or -1) != (1.0, 1.0, -1):
            raise UserError(
                f"policy.generation has temperature={generation.temperature:g}, top_p={generation.top_p:g}, top_k="
                f"{generation.top_k}, and servers (teacher.urls) give the teacher's own distribution: draw answers "
                "with temperature=1, top_p=1, top_k=null, or use teacher.adapter"
            )
        wrong = [url for url in teacher.urls if not url.startswith(("http://", "https://"))]
        if wrong or len(set(teacher.urls)) < len(teacher.urls):
            raise UserError(f"teacher.urls={teacher.urls}: wanted each server once, as http://host:port")
        wanted, vocabulary = _section(recipe).num_candidates, read_base(policy).shapes.vocab_size
        if wanted > vocabulary:
            raise UserError(f"distillation.topk_logits_k={wanted}: the model has {vocabulary} tokens; use fewer")
        super().check(recipe, world)

    def not_ready(self, recipe: Recipe, world: World) -> list[str]:
        return super().not_ready(recipe, world) + teacher_servers(recipe).not_ready()

    def check_outside(self, recipe: Recipe, world: World) -> None:
        super().check_outside(recipe, world)
        teacher_servers(recipe).check()

    def metric_names(self, recipe: Recipe, kind: str) -> Sequence[str]:
        names = super().metric_names(recipe, kind)
        own = SUMMED if _section(recipe).num_candidates else ESTIMATED
        return (*names, *METRICS, *own) if kind == "train" else names

    def train(self, session: Session, loader: Loader, validation: Loader | None) -> None:
        train_on_rollouts(session, loader, validation, DistillationTrainer)
