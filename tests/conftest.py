"""Which tests must run in one process of `pytest -n`: those of a file share its fixtures, and every test of Megatron
policies shares the ranks that are started once for all of them."""

import pytest

RANKS_OF_ALL = "workers"  # tests/distributed/conftest.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        shared = RANKS_OF_ALL in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(RANKS_OF_ALL if shared else item.location[0]))
