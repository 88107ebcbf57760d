"""The kinds of adapters. A new one is a file here, a line in `METHODS` and, for factors of its own, a line in
`layout.FACTORS_OF_TYPE`."""

from megatron_lora.lora.methods.additive import Lora
from megatron_lora.lora.methods.base import AdapterMethod, ReadWeight, Values

__all__ = ["METHODS", "AdapterMethod", "ReadWeight", "Values", "method_of"]

METHODS: dict[str, AdapterMethod] = {method.type: method for method in (Lora(),)}


def method_of(type_name: str) -> AdapterMethod:
    """The kind that `adapter.json` names."""
    return METHODS[type_name]
