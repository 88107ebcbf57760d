"""What the training loops share: the run's folder, reports, validation times, checkpoints, resume and interruption."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_lora.config.loader import dump_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.export import write_peft_folder
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec
from megatron_lora.metrics import RunReporter
from megatron_lora.policy.adapter_start import check_same_adapter, planned_adapter
from megatron_lora.policy.interface import Policy, StepResult
from megatron_lora.policy.weights_check import local_fingerprint
from megatron_lora.runtime.memory import peak_memory_bytes, reset_peak_memory
from megatron_lora.runtime.world import World
from megatron_lora.trainers.interrupt import Interrupt
from megatron_lora.trainers.run_folder import RunFolder, Step


class StepAbandoned(Exception):
    """A signal ended a step before it had changed the policy."""


class Resumable(Protocol):
    """Something whose position is part of a checkpoint: a data loader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Session:
    """One run on one rank.

    step: optimizer steps done. total_steps: of the whole run. loader: the training data's position. metrics: the newest
    values by (kind, name), for `checkpointing.metric_name`.
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
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    metrics: dict[tuple[str, str], float] = field(default_factory=dict)
    _saved_step: int = -1
    _pending: Callable[[bool], bool] | None = None

    def resume(self, found: Step | None) -> None:
        """Restore policy, optimizer, random states and data position from a complete checkpoint."""
        if found is None:
            return
        self.policy.load(found.weights, found.optimizer)
        self.loader.load_state_dict(dict(found.info["loader"]))
        self.step = self._saved_step = found.number
        self.state = dict(found.info.get("state", {}))
        ranked_by, value = self.recipe.checkpointing, found.info.get("metric")
        if ranked_by.metric is not None and value is not None and found.info["metric_name"] == ranked_by.metric_name:
            self.metrics[ranked_by.metric] = value
        note = "" if found.optimizer else "; it has no optimizer state, so the optimizer starts anew"
        self.reporter.message(f"resumed from {found.path}{note}")

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
        self.reporter.log(kind, self.step, values)
        for name, value in values.items():
            if isinstance(value, int | float):
                self.metrics[kind, name] = float(value)

    def _peak_memory(self) -> float:
        """The largest of all ranks, GiB."""
        peak = torch.tensor(peak_memory_bytes(self.world.device), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        reset_peak_memory(self.world.device)
        return float(peak) / 2**30

    def should_stop(self) -> bool:
        """Whether a signal asked this run to end. Collective."""
        return self.interrupt.agreed(self.world)

    def abandon_step_if_asked(self) -> None:
        """For steps of several long phases, before the policy changes: a scheduler that sends a signal does not wait
        for long. Collective; raises StepAbandoned on every rank."""
        if self.should_stop():
            raise StepAbandoned

    def save_if_due(self, *, force: bool = False) -> None:
        """Write a checkpoint every `save_period` steps, and where forced, once a step. Collective."""
        checkpointing = self.recipe.checkpointing
        self._poll(blocking=False)
        if not checkpointing.enabled or self.step in (0, self._saved_step):
            return
        if force or self.step % checkpointing.save_period == 0:
            self.save()

    def save(self) -> None:
        """Write `step_N/`, whole or not at all. Collective."""
        self._poll(blocking=True)
        number, checkpointing = self.step, self.recipe.checkpointing
        partial = self.folder.partial(number)
        if self.world.is_main:
            partial.mkdir(parents=True, exist_ok=False)
        dist.barrier()
        optimizer = partial / "policy" / "optimizer" if checkpointing.save_optimizer else None
        pending = self.policy.save(
            partial / "policy" / "weights",
            optimizer,
            asynchronous=self.recipe.policy.megatron_cfg.checkpoint.async_save,
        )
        info = self._info()
        if self.recipe.policy.adapter.enabled:
            adapter = self.policy.adapter()
            if self.world.is_main:
                write_peft_folder(partial / "hf_adapter", adapter.config, adapter.tensors)
        if self.world.is_main:
            self.tokenizer.save_pretrained(partial / "policy" / "tokenizer")
            (partial / "config.yaml").write_text(dump_recipe(self.recipe))
        self._saved_step = number

        def poll(blocking: bool) -> bool:
            if pending is not None and not pending(blocking):
                return False
            if self.world.is_main:
                self.folder.finish(number, info, checkpointing.keep_top_k, checkpointing.higher_is_better)
            dist.barrier()
            return True

        self._pending = poll
        self._poll(blocking=pending is None)

    def _poll(self, *, blocking: bool) -> None:
        if self._pending is not None and self._pending(blocking):
            self._pending = None

    def _info(self) -> dict[str, Any]:
        metric = self.recipe.checkpointing.metric
        return {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "state": self.state,
            "metric_name": self.recipe.checkpointing.metric_name,
            "metric": self.metrics.get(metric) if metric is not None else None,
            "layout": {name: getattr(self.world, name) for name in ("tp", "pp", "cp", "dp")},
            "time": time.time(),
        }

    def finish(self) -> None:
        """Save what is not saved yet and wait for it. Collective."""
        self.save_if_due(force=True)
        self._poll(blocking=True)


def check_checkpoint(found: Step, policy: PolicyConfig) -> None:
    """Whether a run of this recipe can go on from the checkpoint, as far as its files tell before weights load.

    Raises UserError for an adapter where a whole model is trained or the other way round, for an adapter of another
    base, and for one of other linears, ranks or scales.
    """
    has_adapter = (found.weights / ADAPTER_FILE).is_file()
    if has_adapter != policy.adapter.enabled:
        kinds = {True: "an adapter", False: "a whole model"}
        raise UserError(
            f"{found.path} holds {kinds[has_adapter]}, this run trains {kinds[not has_adapter]}; choose another "
            "checkpointing.checkpoint_dir"
        )
    if not has_adapter:
        return
    stored = AdapterSpec.load(found.weights / ADAPTER_FILE)
    fingerprint = local_fingerprint(policy.model_name)
    wanted = planned_adapter(policy)
    assert wanted is not None
    check_same_adapter(wanted.spec, stored, found.path)
    if None not in (fingerprint, stored.base_fingerprint) and fingerprint != stored.base_fingerprint:
        raise UserError(
            f"{found.path} was trained on another model ({stored.base_model_name}): its weights differ from those in "
            f"policy.model_name={policy.model_name!r}; name that model, or choose another checkpointing.checkpoint_dir"
        )
