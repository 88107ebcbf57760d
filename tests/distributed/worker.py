"""Under torchrun: run the cases of a JSON file one after the other and save what this rank found in each.

Arguments: the file (name -> `cases.Case` of one backend with its folders filled in) and the folder for
`<name>.<rank>.pt`.
"""

import gc
import json
import logging
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path

import torch

from megatron_lora.runtime.world import init_distributed

# Modules with checks of their own, by backend; importing Megatron takes seconds.
CHECKS = {
    "megatron": (
        "policy_checks",
        "critic_checks",
        "megatron_checks",
        "megatron_cost_checks",
        "megatron_failure_checks",
        "megatron_fault_checks",
        "native_checks",
        "replay_checks",
    ),
    "dtensor": ("policy_checks", "critic_checks", "dtensor_checks", "dtensor_fault_checks"),
}

# What every group has to wait, those of Megatron and of FSDP as well: unlike any default.
TIMEOUT_SECONDS = 1260.0


def check_timeouts() -> None:
    for group in torch.distributed.distributed_c10d._world.pg_map:
        if group is not None and group.size() > 1:
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout.total_seconds() == TIMEOUT_SECONDS, f"{group.group_desc} waits {options._timeout}"


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cases = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    [backend] = {case["backend"] for case in cases.values()}
    modules = [import_module(f"tests.distributed.{name}") for name in CHECKS[backend]]
    checks = {name: check for module in modules for name, check in module.CHECKS.items()}
    rank = init_distributed(TIMEOUT_SECONDS).rank
    failed: list[str] = []
    for name, case in cases.items():
        # The end of stderr is shown where a rank fails.
        print(f"rank {rank}, {time.process_time():.0f} s: case {name}", file=sys.stderr, flush=True)
        try:
            found = checks[case["check"]](case | {"shared_folder": str(folder)})
        except Exception:
            if len(cases) == 1 or torch.distributed.get_world_size() > 1:
                raise  # the other ranks may wait for this one
            traceback.print_exc()
            failed.append(name)
            continue
        partial = folder / f"{name}.{rank}.partial"
        torch.save(found, partial)
        partial.replace(folder / f"{name}.{rank}.pt")
        gc.collect()
    check_timeouts()
    torch.distributed.destroy_process_group()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
