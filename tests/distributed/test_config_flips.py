"""Every field of every family's config at other values, on both backends: transformers' loss, or a refusal by name."""

import json
from pathlib import Path

import pytest

from tests.distributed.config_flips_worker import BACKENDS
from tests.support.config_flips import FAMILIES, flips
from tests.support.launch import run_ranks

# A family's seventy models take a minute or two; `tests/unit/test_config_gate.py` has which of them are refused.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flips")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_flip_has_transformers_loss_or_is_refused_by_name(family: str, folder: Path) -> None:
    run_ranks("tests.distributed.config_flips_worker", 1, family, folder)
    results = json.loads((folder / f"flips_{family}.json").read_text())
    assert results.keys() == {name for name, _ in flips(family)}
    wrong = {}
    for flip, result in results.items():
        wanted = result["transformers"]
        for backend in BACKENDS:
            got = result[backend]
            if "refused" in got:
                names = [*result["changes"], *result["changes"].get("quantization_config", ())]
                held = any(name in got["refused"] for name in [*names, "hidden_size", "rope"])
            else:
                held = "loss" in got and wanted is not None and abs(got["loss"] - wanted) <= TOLERANCE * abs(wanted)
            if not held:
                wrong[f"{flip} {backend}"] = (got, wanted)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    # Few may be refused for the test to say anything.
    assert sum("loss" in result["megatron"] for result in results.values()) > 0.7 * len(results)
