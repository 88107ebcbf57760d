"""NeMo RL's Python entry points, under the name that scripts import; the library is megatron_lora.conversion."""

from megatron_lora.conversion.export import export_lora_adapter_to_hf, import_hf_adapter, merge_lora_to_hf

__all__ = ["export_lora_adapter_to_hf", "import_hf_adapter", "merge_lora_to_hf"]
