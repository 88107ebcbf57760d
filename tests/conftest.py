"""Which tests must run in one process of `pytest -n`, and which are `make test-fast`."""

import pytest

RANKS_OF_ALL = "workers"  # tests/distributed/conftest.py
# Besides the unit tests: a case of two ranks of each kind of path.
FAST = (
    "test_megatron_parity.py::test_ten_steps_equal_transformers_and_peft[train_sp]",
    "test_megatron_parity.py::test_ten_steps_equal_transformers_and_peft[train_dora_pp]",
    "test_megatron_checkpoint.py::test_the_same_layout_goes_on_bit_for_bit[checkpoint_pp_dropout]",
    "test_megatron_adapters.py::test_adapters_add_no_collective_to_the_bases_own[communication_sp]",
    "test_rollout_native.py::test_sampled_logprobs_equal_the_trainers[sp]",
    "test_dtensor.py::test_training_equals_transformers_and_peft[sp]",
    "test_dtensor.py::test_resume_is_bit_identical[resume_tp]",
)


@pytest.hookimpl(tryfirst=True)  # before the plugin reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # The tests of a file share its fixtures; those of Megatron policies share the ranks started once for them all.
        shared = RANKS_OF_ALL in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(RANKS_OF_ALL if shared else item.location[0]))
        unit = item.path.parent.name == "unit" and item.get_closest_marker("slow") is None
        if unit or item.nodeid.endswith(FAST):
            item.add_marker(pytest.mark.fast)
