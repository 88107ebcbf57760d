"""The adapter a run starts with: drawn from a seed, or read from an HF PEFT folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_lora.config.schema_adapters import PeftConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModelShapes, build_layout
from megatron_lora.lora.peft_format import from_hf
from megatron_lora.lora.targets import select_targets


@dataclass(frozen=True)
class StartingAdapter:
    """spec: what is adapted. tensors: the whole factors, or None where they are to be drawn."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor] | None


def starting_adapter(peft: PeftConfig, shapes: ModelShapes, model_name: str) -> StartingAdapter:
    """The recipe's adapter. Raises UserError for a pattern that fits nothing, or a folder that does not fit the base."""
    settings = peft.model_dump(mode="json", exclude={"enabled"})
    if peft.init_adapter is not None:
        config, tensors = read_peft_folder(Path(peft.init_adapter))
        spec, fused = from_hf(config, tensors, shapes, base_model_name=model_name)
        spec.settings = settings | {"init_adapter": peft.init_adapter}
        return StartingAdapter(spec, fused)
    names = select_targets(shapes, peft.target_modules, peft.exclude_modules)
    modules = [build_layout(name, peft.dim, peft.alpha, shapes) for name in names]
    spec = AdapterSpec(base_model_name=model_name, shapes=shapes, modules=modules, settings=settings)
    return StartingAdapter(spec, None)


def read_peft_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json's content, tensors) of an HF PEFT folder. Raises UserError where a file is missing or
    damaged."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise UserError(f"{folder} is no HF PEFT adapter folder: it lacks {path.name}")
    try:
        return json.loads(config.read_text()), load_file(weights)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} is damaged: {error}") from error
