"""What the training loops share: the run's folder, reports, validation times, checkpoints, resume and interruption."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_lora.config.schema import Recipe
from megatron_lora.metrics import RunReporter
from megatron_lora.policy.interface import Policy, StepResult
from megatron_lora.runtime.activity import held
from megatron_lora.runtime.agreement import any_rank
from megatron_lora.runtime.memory import peak_memory_bytes, reset_peak_memory
from megatron_lora.runtime.world import World
from megatron_lora.trainers.checkpoint_writer import CheckpointWriter
from megatron_lora.trainers.identity import RunIdentity
from megatron_lora.trainers.interrupt import Interrupt
from megatron_lora.trainers.run_folder import RunFolder, Step
from megatron_lora.trainers.write_failure import WriteFailure, describe_failure


class StepAbandoned(Exception):
    """A signal ended a step before it had changed the policy."""


class Resumable(Protocol):
    """Something whose position is part of a checkpoint: a data loader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Session:
    """One run on one rank.

    step: optimizer steps done. total_steps: of the whole run. loader: the training data's position. identity: what a
    checkpoint says it is of. metrics: values of the present step by (kind, name), for `checkpointing.metric_name`.
    """

    recipe: Recipe
    world: World
    tokenizer: Any
    policy: Policy
    folder: RunFolder
    reporter: RunReporter
    loader: Resumable
    total_steps: int
    interrupt: Interrupt
    identity: RunIdentity
    writer: CheckpointWriter
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    metrics: dict[tuple[str, str], float] = field(default_factory=dict)
    _saved_step: int = -1
    _metrics_step: int = -1
    _largest_peak: float = 0.0
    _began: float = field(default_factory=time.monotonic)
    _first_step: int = 0

    def resume(self, found: Step | None) -> None:
        """Restore policy, optimizer, random states and data position from a complete checkpoint."""
        if found is None:
            return
        self.policy.load(found.weights, found.optimizer)
        if self.policy.critic is not None:
            self._resume_critic(self.policy.critic, found)
        self.loader.load_state_dict(dict(found.info["loader"]))
        self.step = self._saved_step = self._first_step = found.number
        self.state = dict(found.info.get("state", {}))
        note = "" if found.optimizer else "; it has no optimizer state, so the optimizer starts anew"
        self.reporter.message(f"resumed from {found.path}{note}")

    def _resume_critic(self, critic: Policy, found: Step) -> None:
        if found.critic_weights is None:
            self.reporter.message(f"{found.path} is of a run without a critic: the critic starts anew")
        else:
            critic.load(found.critic_weights, found.critic_optimizer)

    def log_train(self, result: StepResult, seconds: float, extra: Mapping[str, Any] | None = None) -> None:
        """One line of metrics.jsonl under the contract's names."""
        values: dict[str, Any] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "num_target_tokens": result.num_target_tokens,
            "num_tokens": result.num_tokens,
            "step_time_seconds": seconds,
            "tokens_per_second": result.num_tokens / seconds,
            "peak_memory_gib": self._peak_memory(),
            **result.metrics,
            **(extra or {}),
        }
        self._log("train", values)

    def log_validation(self, values: Mapping[str, Any]) -> None:
        self._log("validation", values)

    def _log(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._metrics_step != self.step:
            # A step that was not validated has no metric of validation, whatever the last one was.
            self.metrics, self._metrics_step = {}, self.step
        self.reporter.log(kind, self.step, values)
        for name, value in values.items():
            if isinstance(value, int | float):
                self.metrics[kind, name] = float(value)

    def _peak_memory(self) -> float:
        """The largest of all ranks, GiB."""
        peak = torch.tensor(peak_memory_bytes(self.world.device), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        reset_peak_memory(self.world.device)
        self._largest_peak = max(self._largest_peak, float(peak) / 2**30)
        return float(peak) / 2**30

    def _describe_memory(self) -> str:
        """The run's peak, and what of it was held throughout."""
        if self.world.device.type != "cuda":
            return f"peak memory of a process: {self._largest_peak:.2f} GiB"
        parts = [f"{name} {size / 2**30:.2f}" for name, size in held().items()]
        return (
            f"peak memory of a GPU, by torch's count: {self._largest_peak:.2f} GiB; of it held: {', '.join(parts)}; "
            "the rest is activations, logits and what libraries keep for a step"
        )

    def should_stop(self) -> bool:
        """Whether a signal asked this run to end. Collective; raises WriteFailure where what the run reports could not
        be written."""
        failure = self.reporter.failure
        if any_rank(failure is not None, self.world.device):
            reason = describe_failure(failure, self.folder.path) if failure is not None else "see the first rank"
            raise WriteFailure(
                f"step {self.step} could not be recorded in {self.folder.path} ({reason}); the run stops here, the "
                "last complete checkpoint stands. Make room, then give the same command to go on"
            )
        return self.interrupt.agreed(self.world)

    def out_of_time(self) -> bool:
        """Whether another step, as long as they were on average, would end after `checkpoint_must_save_by`.
        Collective."""
        limit = self.recipe.checkpointing.seconds_to_save
        if limit is None:
            return False
        elapsed = time.monotonic() - self._began
        average = elapsed / max(1, self.step - self._first_step)
        return any_rank(elapsed + average >= limit, self.world.device)

    def abandon_step_if_asked(self) -> None:
        """For steps of several long phases, before the policy changes: a scheduler that sends a signal does not wait
        for long. Collective; raises StepAbandoned on every rank."""
        if self.should_stop():
            raise StepAbandoned

    def save_if_due(self, *, force: bool = False) -> None:
        """Write a checkpoint every `save_period` steps, and where forced, once a step. Collective."""
        checkpointing = self.recipe.checkpointing
        self.writer.poll(blocking=False)
        if not checkpointing.enabled or self.step in (0, self._saved_step):
            return
        if force or self.step % checkpointing.save_period == 0:
            self.writer.save(self.step, self._info())
            self._saved_step = self.step

    def _info(self) -> dict[str, Any]:
        metric = self.recipe.checkpointing.metric
        return {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "state": self.state,
            "metric_name": self.recipe.checkpointing.metric_name,
            "metric": self.metrics.get(metric) if metric is not None and self._metrics_step == self.step else None,
            "layout": {name: getattr(self.world, name) for name in ("tp", "pp", "cp", "dp")},
            "time": time.time(),
            "run": asdict(self.identity),
        }

    def finish(self) -> None:
        """Save what is not saved yet and wait for it. Collective."""
        self.save_if_due(force=True)
        self.writer.poll(blocking=True)
        if self._saved_step > 0:
            what = "hf_adapter" if self.recipe.policy.adapter.enabled else "policy/weights"
            self.reporter.result = self.folder.path / f"step_{self._saved_step}" / what
        if self._largest_peak:
            self.reporter.message(self._describe_memory())
