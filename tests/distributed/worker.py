"""Ranks that run the cases of a JSON file one after the other and save what each of them found.

Arguments: the file (name -> `cases.Case` of one backend, or of both, with its folders filled in), the folder for
`<name>.<rank>.pt`, and how many ranks. They are forked from one process that has done their imports, half a minute of
a core for each.
"""

import gc
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from megatron_lora.runtime.processes import die_with_parent
from megatron_lora.runtime.world import init_distributed
from tests.support.forked_ranks import run_forked
from tests.support.rank_server import load_megatron

Check = Callable[[dict[str, Any]], dict[str, Any]]

# Modules with checks of their own, by backend; importing Megatron takes seconds.
CHECKS = {
    "megatron": (
        "policy_checks",
        "conversion_checks",
        "critic_checks",
        "megatron_checks",
        "megatron_cost_checks",
        "megatron_failure_checks",
        "megatron_fault_checks",
        "native_checks",
        "replay_checks",
    ),
    "both": ("backends_checks",),
    "dtensor": ("policy_checks", "critic_checks", "dtensor_checks", "dtensor_fault_checks"),
}

# What every group has to wait, those of Megatron and of FSDP as well: unlike any default.
TIMEOUT_SECONDS = 1260.0


def check_timeouts() -> None:
    for group in torch.distributed.distributed_c10d._world.pg_map:
        if group is not None and group.size() > 1:
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout.total_seconds() == TIMEOUT_SECONDS, f"{group.group_desc} waits {options._timeout}"


def load_checks(backend: str) -> dict[str, Check]:
    """By name; with all that ranks of this backend import."""
    if backend != "dtensor":
        load_megatron()
    modules = [import_module(f"tests.distributed.{name}") for name in CHECKS[backend]]
    return {name: check for module in modules for name, check in module.CHECKS.items()}


def run_cases(cases: Mapping[str, dict[str, Any]], checks: Mapping[str, Check], folder: Path) -> None:
    """On one rank."""
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
        unfinished = folder / f"{name}.{rank}.partial"
        torch.save(found, unfinished)
        unfinished.replace(folder / f"{name}.{rank}.pt")
        gc.collect()
    check_timeouts()
    torch.distributed.destroy_process_group()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cases = json.loads(Path(sys.argv[1]).read_text())
    [backend] = {case["backend"] for case in cases.values()}
    checks = load_checks(backend)
    sys.exit(run_forked(int(sys.argv[3]), partial(run_cases, cases, checks, Path(sys.argv[2]))))


if __name__ == "__mp_main__":
    # A helper of a checkpoint's writer, which imports this module anew.
    die_with_parent()

if __name__ == "__main__":
    main()
