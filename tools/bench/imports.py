"""Seconds of CPU that a process takes to import what a run of the Megatron backend imports before its first step."""

import importlib
import resource
import sys
from collections.abc import Callable

PARTS: dict[str, Callable[[], object]] = {
    "reading recipes": lambda: importlib.import_module("megatron_lora.train"),
    "torch": lambda: importlib.import_module("torch"),
    "trainers, data, conversion": lambda: importlib.import_module("megatron_lora.trainers.run"),
    "Megatron-Core": lambda: _call("megatron_lora.runtime.cpu", "install_cpu_stand_ins"),
    "the backend": lambda: importlib.import_module("megatron_lora.policy.megatron.policy"),
    "Megatron-Bridge": lambda: _call("megatron_lora.runtime.transformer_engine", "import_bridge"),
}


def _call(module: str, function: str) -> object:
    return getattr(importlib.import_module(module), function)()


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    before = _seconds()
    for name, part in PARTS.items():
        part()
        now = _seconds()
        print(f"{name:<28}{now - before:6.2f}", flush=True)
        before = now
    print(f"{'all, with Python itself':<28}{_seconds():6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
