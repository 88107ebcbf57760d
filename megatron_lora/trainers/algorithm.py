"""What a run asks of an algorithm. One object each, listed in `algorithms.py`; its section of the recipe is
`config/algorithm_section.py`'s."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from megatron_lora.config.schema import Recipe
from megatron_lora.data.loader import GroupLoader
from megatron_lora.metrics import RunReporter
from megatron_lora.policy.interface import Policy
from megatron_lora.runtime.world import World
from megatron_lora.trainers.session import Session

Loader = GroupLoader[Any]

COUNTS = ("num_target_tokens", "step_time_seconds", "tokens_per_second")
TRAIN = ("loss", "grad_norm", "lr", "num_tokens", "peak_memory_gib", *COUNTS)


class Algorithm(ABC):
    """curve: the metric whose curve is shown at the end of a run. shares_prompts: whether rows of a batch begin
    alike."""

    curve: str = "loss"
    shares_prompts: bool = False

    def check(self, recipe: Recipe, world: World) -> None:  # noqa: B027
        """Raise UserError for what cannot be run, before data and weights are read."""

    def check_data(self, recipe: Recipe, sets: Sequence[Any]) -> None:  # noqa: B027
        """Raise UserError for prepared data sets that the run cannot use. sets: those of all blocks."""

    @abstractmethod
    def build_loaders(self, recipe: Recipe, train: Any, validation: Any | None) -> tuple[Loader, Loader | None]:
        """The training loader, and the validation's. Raises UserError."""

    def batches_a_step(self, recipe: Recipe) -> int:
        """Of the training loader, at least."""
        return 1

    def updates_a_step(self, recipe: Recipe) -> int:
        """Optimizer steps."""
        return 1

    @abstractmethod
    def describe_steps(self, recipe: Recipe, loader: Loader, steps: int, updates: int) -> str:
        """A line of --dry-run."""

    def not_ready(self, recipe: Recipe, world: World) -> list[str]:
        """Lines of --dry-run: what has to be there when a run begins, and is not yet."""
        return []

    def check_outside(self, recipe: Recipe, world: World) -> None:  # noqa: B027
        """Raise UserError for servers that a run which begins now could not use, before weights load. On the first
        rank."""

    @abstractmethod
    def metric_names(self, recipe: Recipe, kind: str) -> Sequence[str]:
        """Names of the numbers in lines of this kind ("train", "validation"); some are there under some settings."""

    def before_resume(  # noqa: B027
        self, recipe: Recipe, policy: Policy, reporter: RunReporter, loaders: Sequence[Loader]
    ) -> None:
        """What takes the model as it starts, before a checkpoint is loaded. Collective."""

    @abstractmethod
    def train(self, session: Session, loader: Loader, validation: Loader | None) -> None:
        """All steps that are left. Collective."""
