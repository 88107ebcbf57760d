"""What a worker can be asked about models whose config differs in one field."""

from pathlib import Path
from typing import Any

from megatron_lora.policy.interface import Policy
from tests.distributed.megatron_build import build_policy
from tests.support.config_sweep import sweep


def config_sweep(case: dict[str, Any]) -> dict[str, Any]:
    """`tests.support.config_sweep.sweep` of options.names."""

    def build(base: Path) -> Policy:
        return build_policy(case | {"base_folder": str(base)})

    return sweep(Path(case["shared_folder"]) / case["name"], case["options"]["names"], build, megatron=True)


CHECKS = {"config_sweep": config_sweep}
