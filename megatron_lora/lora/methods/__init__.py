"""The kinds of adapters, by the recipe's `type`. A new one is a file here and a line in `METHODS`; for factors of its
own also one in `layout.FACTORS_OF_TYPE`, and one in `peft_config.FLAG_OF_TYPE` where PEFT has a flag for it."""

from megatron_lora.lora.methods.additive import CanonicalLora, Lora
from megatron_lora.lora.methods.base import AdapterMethod, ReadWeight, Values
from megatron_lora.lora.methods.dora import Dora

__all__ = ["METHODS", "AdapterMethod", "ReadWeight", "Values", "method_of"]

METHODS: dict[str, AdapterMethod] = {"lora": Lora(), "canonical_lora": CanonicalLora(), "dora": Dora()}


def method_of(type_name: str) -> AdapterMethod:
    """The kind that a recipe, or an `adapter.json`, names."""
    return METHODS[type_name]
