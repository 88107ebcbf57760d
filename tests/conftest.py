"""Which tests must run in one process of `pytest -n`, and which are `make test-fast`."""

from pathlib import Path, PurePath
from typing import Any

import pytest

# Files whose tests share ranks or a run that is started once for all of them, by the start of their names. Every
# other file is a group of its own.
TOGETHER = {
    "test_megatron_": "Megatron's ranks",
    "test_critic": "Megatron's ranks",
    "test_candidates": "Megatron's ranks",
    "test_router_replay": "Megatron's ranks",
    "test_dtensor": "DTensor's ranks",
    "test_config_sweep": "Megatron's ranks",
    "test_conversion.": "Megatron's ranks",
    "test_rollout_native": "Megatron's ranks",
    "test_sft_": "SFT's run",
}
# Besides the unit tests: a case of two ranks of each kind of path.
FAST = (
    "test_megatron_parity.py::test_ten_steps_equal_transformers_and_peft[train_sp]",
    "test_megatron_checkpoint.py::test_the_same_layout_goes_on_bit_for_bit[checkpoint_pp_dropout]",
    "test_rollout_native.py::test_sampled_logprobs_equal_the_trainers[native_sp_dora]",
    "test_dtensor.py::test_training_equals_transformers_and_peft[dtensor_sp]",
)


def group(nodeid: str) -> str:
    """The tests that run in one process with this one."""
    file = nodeid.split("::")[0]
    if "[critic_dtensor" in nodeid or "[candidates_dtensor" in nodeid:
        return TOGETHER["test_dtensor"]
    return next((name for start, name in TOGETHER.items() if PurePath(file).name.startswith(start)), file)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is nobody to ask for it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        unit = item.path.parent.name == "unit" and item.get_closest_marker("slow") is None
        if unit or item.nodeid.endswith(FAST):
            item.add_marker(pytest.mark.fast)
    if lost := _lost_fast_tests(items):
        raise pytest.UsageError(f"FAST in tests/conftest.py names tests that are not there: {', '.join(lost)}")


def _lost_fast_tests(items: list[pytest.Item]) -> list[str]:
    """Those of FAST that a rename has left without a test: their file is collected as a whole, and has no such test."""
    names = {item.nodeid.rpartition("/")[2] for item in items}
    given = [argument for argument in items[0].config.args if "::" in argument] if items else []
    files = {name.partition("::")[0] for name in names} - {Path(argument.partition("::")[0]).name for argument in given}
    return [name for name in FAST if name.partition("::")[0] in files and name not in names]
