"""Imports of Megatron-Core and Megatron-Bridge without what they bring along and a start does not need."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Megatron-Core looks for these when it is imported and goes on without: its timers would write to the first, and its
# checkpoints could lie in the second's stores, neither of which this project uses.
UNUSED = ("wandb", "multistorageclient")


def import_megatron_core() -> None:
    """Does nothing where it is imported already. Comes before anything else that imports it."""
    if "megatron.core" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    absent = [name for name in UNUSED if name not in modules]
    modules |= dict.fromkeys(absent)  # None: not to be imported
    try:
        with compiling_when_called():
            importlib.import_module("megatron.core")
    finally:
        for name in absent:
            del modules[name]


@contextmanager
def compiling_when_called() -> Iterator[None]:
    """torch.compile imports the compiler, which takes as long as all of Megatron-Core. On a machine without a GPU it
    does not yet within this block: what it is given compiles itself when it is called for the first time, which there
    is mostly never."""
    if torch.cuda.is_available():
        yield
        return
    namespace: Any = torch
    compiles = torch.compile
    namespace.compile = _compiled_when_called
    try:
        yield
    finally:
        namespace.compile = compiles


def _compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    if function is None:
        return functools.partial(_compiled_when_called, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():
            return function(*arguments, **keywords)  # a part of what is compiled around it
        if compiled is None:
            compiled = torch.compile(function, **options)
        return compiled(*arguments, **keywords)

    return call
