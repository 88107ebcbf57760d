"""What the trainer's tests share: one base, one data set, one recipe, and one run that nothing disturbed."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.trainer import Ended, gsm8k_folder, run_trainer, save_base, write_recipe


@dataclass(frozen=True)
class Job:
    """base, data, recipe: what a run needs, on disk. root: where runs may be written."""

    root: Path
    base: Path
    data: Path
    recipe: Path

    def arguments(self, run_dir: Path) -> list[str]:
        """The command line of the TP=2 run that is killed, resumed and compared."""
        return [
            str(self.recipe),
            "policy.megatron_cfg.tensor_model_parallel_size=2",
            f"checkpointing.checkpoint_dir={run_dir}",
        ]


@dataclass(frozen=True)
class Run:
    """A run that went through. dir: its folder. logs: the trackers'."""

    dir: Path
    logs: Path
    ended: Ended


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("sft")
    base, data = save_base(root / "base"), gsm8k_folder(root / "gsm8k")
    return Job(root, base, data, write_recipe(root / "recipe.yaml", base, data))


@pytest.fixture(scope="session")
def whole_run(job: Job) -> Run:
    """Twelve steps at TP=2 on two ranks, W&B offline and TensorBoard on."""
    run_dir, logs = job.root / "whole", job.root / "logs"
    ended = run_trainer(
        *job.arguments(run_dir),
        "logger.wandb_enabled=true",
        "logger.tensorboard_enabled=true",
        f"logger.log_dir={logs}",
        ranks=2,
        WANDB_MODE="offline",
    )
    return Run(run_dir, logs, ended)
