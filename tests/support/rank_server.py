"""Ranks of the trainer without the wait for its imports: forked from one process that has done them.

Requests come on stdin and are answered on stdout, one JSON object a line:
{"arguments": [...], "ranks": 2, "port": 29600, "out": FILE, "err": FILE} -> process ids of the started ranks;
{"wait": [pid, ...]} -> their exit statuses (negative: killed by that signal), once all have ended.
"""

import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any

from megatron_lora import train
from megatron_lora.runtime.cpu import install_cpu_stand_ins
from megatron_lora.runtime.megatron_core import import_megatron_core
from megatron_lora.runtime.transformer_engine import import_bridge, prepare_transformer_engine


def load_megatron() -> None:
    """In the order in which a run imports it."""
    import_megatron_core()
    install_cpu_stand_ins()
    prepare_transformer_engine()
    import_bridge()


def load_everything() -> None:
    load_megatron()
    for module in ("megatron.bridge", "megatron_lora.policy.megatron.policy", "megatron_lora.trainers.run"):
        import_module(module)


def start_rank(request: dict[str, Any], rank: int) -> int:
    """Fork; the child becomes what torchrun would have started."""
    pid = os.fork()
    if pid:
        return pid
    status = train.FAILURE_STATUS
    try:
        os.setsid()
        for descriptor, name in ((1, request["out"]), (2, request["err"])):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, descriptor)
        size = str(request["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(request["port"])}
        # What multiprocessing's helpers import: the same module as under torchrun.
        sys.modules["__main__"] = train
        status = train.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        train._leave(status)
    return 0


def main() -> None:
    load_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        else:
            answer = [start_rank(request, rank) for rank in range(request["ranks"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
