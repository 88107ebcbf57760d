"""Stand-ins for Transformer Engine, so that Megatron's Transformer Engine layer specs and megatron-bridge work where it
is not installed.

`prepare_transformer_engine` is called once, before anything else of Megatron is imported. With Transformer Engine
installed it does nothing. Without it:

1. the layer classes that Megatron-Core's and megatron-bridge's specs name (`TENorm`, `TERowParallelLinear`, ...) become
   the plain PyTorch ones of `native_layers.py`, so one model description serves both;
2. while megatron-bridge is imported, `transformer_engine` is an inert placeholder: bridge imports it unconditionally.
   Afterwards the placeholder is gone, because Megatron-Core decides by import whether Transformer Engine is there.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from megatron_lora.runtime.megatron_core import compiling_when_called, import_megatron_core

_prepared = False


def have_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def prepare_transformer_engine() -> None:
    """Make Megatron's Transformer Engine specs buildable without it. Does nothing where it is installed."""
    global _prepared
    if _prepared or have_transformer_engine():
        return
    _prepared = True
    _put_native_layers_into_megatron_core()


def import_bridge() -> ModuleType:
    """megatron.bridge, which takes several seconds to import: only called where a base model is converted."""
    if "megatron.bridge" in sys.modules:
        return sys.modules["megatron.bridge"]
    import_megatron_core()
    with compiling_when_called():
        return _import_bridge()


def _import_bridge() -> ModuleType:
    if have_transformer_engine():
        return importlib.import_module("megatron.bridge")
    prepare_transformer_engine()
    # These must see that Transformer Engine is not there, so they come before the placeholder.
    for name in (
        "megatron.training",
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.models.multimodal.llava_model",
        "megatron.core.models.mimo",
    ):
        importlib.import_module(name)
    finder = _PlaceholderFinder()
    sys.meta_path.insert(0, finder)
    # Bridge logs every optional part of Transformer Engine that the placeholder lacks, with tracebacks.
    logging.disable(logging.WARNING)
    try:
        bridge = importlib.import_module("megatron.bridge")
    finally:
        logging.disable(logging.NOTSET)
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
    _register_native_layers_with_bridge()
    return bridge


def _put_native_layers_into_megatron_core() -> None:
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import attention, multi_latent_attention, transformer_block

    from megatron_lora.runtime import native_layers as native

    classes = {
        "TENorm": native.NativeNorm,
        "TELayerNormColumnParallelLinear": native.NativeLayerNormColumnParallelLinear,
        "TEColumnParallelLinear": native.NativeColumnParallelLinear,
        "TERowParallelLinear": native.NativeRowParallelLinear,
        "TEDotProductAttention": native.NativeAttention,
    }
    for name, layer in classes.items():
        setattr(extension, name, layer)
    modules: Any = (gpt_layer_specs, attention)
    for module in modules:
        module.TENorm = native.NativeNorm
    specs: Any = gpt_layer_specs
    specs.TESpecProvider = native_spec_provider()
    latent: Any = multi_latent_attention
    latent.TELinear = native.NativeLinear
    block: Any = transformer_block
    block.LayerNormImpl = native.NativeNorm


def native_spec_provider() -> type:
    """A Megatron-Core backend whose layers are the native ones, laid out as Transformer Engine's are."""
    from megatron.core.models.backends import LocalSpecProvider

    from megatron_lora.runtime import native_layers as native

    class NativeSpecProvider(LocalSpecProvider):
        def linear(self) -> type:
            return native.NativeLinear

        def column_parallel_linear(self) -> type:
            return native.NativeColumnParallelLinear

        def row_parallel_linear(self) -> type:
            return native.NativeRowParallelLinear

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return native.NativeLayerNormColumnParallelLinear

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
            return native.NativeNorm

        def core_attention(self) -> type:
            return native.NativeAttention

    return NativeSpecProvider


def _register_native_layers_with_bridge() -> None:
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    AutoMapping.register_module_type("NativeLayerNormColumnParallelLinear", "column")
    AutoMapping.register_module_type("NativeColumnParallelLinear", "column")
    AutoMapping.register_module_type("NativeRowParallelLinear", "row")
    AutoMapping.register_module_type("NativeNorm", "replicated")


class _PlaceholderMeta(type):
    """A class whose every attribute is such a class again: enough for imports, base classes and annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _PlaceholderMeta(name, (), {})

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class _PlaceholderModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _PlaceholderMeta(name, (), {})


class _PlaceholderFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import transformer_engine...` with an inert module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...
