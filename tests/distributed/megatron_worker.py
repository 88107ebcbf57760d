"""Under torchrun: run the cases of a JSON file one after the other and save what this rank found in each.

Arguments: the file (name -> `megatron_case.Case` with its folders filled in) and the folder for `<name>.<rank>.pt`.
"""

import gc
import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from megatron_lora.runtime.world import init_distributed
from tests.distributed import (
    megatron_config_checks,
    megatron_cost_checks,
    megatron_failure_checks,
    megatron_fault_checks,
    megatron_training_checks,
)

CHECKS = (
    megatron_training_checks.CHECKS
    | megatron_cost_checks.CHECKS
    | megatron_failure_checks.CHECKS
    | megatron_fault_checks.CHECKS
    | megatron_config_checks.CHECKS
)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cases = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    rank = init_distributed().rank
    failed: list[str] = []
    for name, case in cases.items():
        # The end of stderr is shown where a rank fails.
        print(f"rank {rank}, {time.process_time():.0f} s: case {name}", file=sys.stderr, flush=True)
        try:
            found = CHECKS[case["check"]](case | {"shared_folder": str(folder)})
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
    torch.distributed.destroy_process_group()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
