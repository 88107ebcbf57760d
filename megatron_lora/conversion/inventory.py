"""The tensors of a model folder against those that its config asks for: names, shapes and dtypes, from the headers of
the files alone."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_lora.conversion.experts import expert_shapes, fused_pieces, fused_shape, fused_tensors, is_fused
from megatron_lora.conversion.four_bit_folder import FourBitFolder
from megatron_lora.conversion.hf_model import HFModel, read_hf_model
from megatron_lora.conversion.merge import FLOATS
from megatron_lora.conversion.safetensors_io import SafetensorsFolder, tensor_bytes
from megatron_lora.conversion.tower import file_names, has_file_names
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.four_bit import weight_names

HEAD = "lm_head.weight"
# Follows from the config; old Llama checkpoints carry it.
DERIVED = "rotary_emb.inv_freq"
NAMED = 4


def open_weights(model: HFModel, folder: Path) -> SafetensorsFolder | FourBitFolder:
    """The weights of a folder, complete and of this model. Raises UserError that names what is missing, too much, of
    another shape, or neither a floating-point number nor a linear in bitsandbytes' 4-bit form."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds adapter_config.json beside the model, and transformers would load that adapter's base "
            "instead; move the adapter to a folder of its own"
        )
    quantized = model.content.get("quantization_config") or model.content.get("compression_config")
    if quantized and not model.stored_four_bit:
        raise UserError(
            f"{folder}/config.json has quantization_config={quantized!r}; of quantized weights only bitsandbytes' "
            "4-bit form is read: give the model in bfloat16 or float32"
        )
    stored = SafetensorsFolder(folder)
    if has_file_names(model.shapes):
        stored.rename(file_names(stored.entries, folder, model.shapes).in_model)
    for name, (linear, layer) in fused_tensors(model.shapes).items():
        # transformers takes a tensor of all experts as well, and some models are published so (Qwen3.5's mixtures).
        if name in stored.entries and stored.entries[name].shape == fused_shape(linear):
            stored.split(name, fused_pieces(linear, layer))
    weights = FourBitFolder(stored) if model.stored_four_bit else stored
    problems = list(_problems(model, weights))
    outside = sorted(set(weights.four_bit) - weight_names(model.shapes)) if isinstance(weights, FourBitFolder) else []
    if outside:
        problems.append(f"in 4 bits, of which only the layers' linears are read: {_some(outside)}")
    if problems:
        raise UserError(
            f"{folder} does not hold the tensors of the model that its config"
            f"{' with policy.hf_config_overrides' if model.overrides else ''} describes: {'; '.join(problems)}; is it "
            "complete, and of this model?"
        )
    return weights


def open_model(
    source: str | Path, folder: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[HFModel, SafetensorsFolder | FourBitFolder]:
    """Config and weights of a local folder. source: how the user named it. overrides: of config.json's fields."""
    model = read_hf_model(folder, f"the model {source}", overrides)
    return model, open_weights(model, folder)


def expected_tensors(model: HFModel) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every parameter and kept buffer; a tied head is not repeated."""
    found = {name: tuple(value.shape) for name, value in model.empty.state_dict().items()}
    if model.shapes.tied_embeddings:
        del found[HEAD]
    return {name: shape for name, shape in found.items() if not is_fused(name, model.shapes)} | expert_shapes(
        model.shapes
    )


def kept_tensors(model: HFModel, weights: WeightSource) -> list[str]:
    """The tensors of a folder that are no part of the model's forward pass and belong to it all the same: the layers
    that predict further tokens, and what a vision-language model has beside its language model. They are not trained,
    and what is written of the whole model has them as they are."""
    further = int(model.content.get("num_nextn_predict_layers") or 0)
    first = model.shapes.num_layers
    prefixes = tuple(f"model.layers.{number}." for number in range(first, first + further))
    # Some classes of transformers name theirs by the numbers of the published model, or by a prefix.
    ignored = type(model.empty)._keys_to_ignore_on_load_unexpected or ()
    expected = expected_tensors(model)
    return [
        name
        for name in weights.entries
        if name not in expected
        and not is_derived(name)
        and (
            name.startswith(prefixes)
            or any(re.search(pattern, name) for pattern in ignored)
            or (model.tower and not name.startswith((model.tower, HEAD)))
        )
    ]


def is_derived(name: str) -> bool:
    return name.endswith(DERIVED)


def _problems(model: HFModel, weights: WeightSource) -> Iterator[str]:
    expected = expected_tensors(model)
    stored = {name: entry for name, entry in weights.entries.items() if not is_derived(name)}
    missing = [name for name in expected if name not in stored]
    extra = sorted(stored.keys() - expected.keys() - set(kept_tensors(model, weights)))
    embedding = model.shapes.hf_embedding
    if model.shapes.tied_embeddings and HEAD in extra and embedding in stored:
        extra.remove(HEAD)
        if not _same(weights, HEAD, embedding):
            yield f"config.json ties {HEAD} to {embedding}, but they differ (set tie_word_embeddings to false)"
    if missing:
        yield f"missing {_some([_with_relative(name, extra) for name in missing])}"
    if extra:
        yield f"unexpected {_some(extra)}"
    shapes = [
        f"{name} is {_shown(stored[name].shape)}, wanted {_shown(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if shapes:
        yield f"of another shape: {_some(shapes)}"
    dtypes = [
        f"{name} is {str(entry.dtype).removeprefix('torch.')}"
        for name, entry in stored.items()
        if entry.dtype not in FLOATS
    ]
    if dtypes:
        yield f"not stored as floating-point numbers (quantized?): {_some(dtypes)}"


def _with_relative(name: str, extra: list[str]) -> str:
    """`name`, and the stored name that differs from it by a prefix."""
    relative = next((other for other in extra if other.endswith(f".{name}") or name.endswith(f".{other}")), None)
    return name if relative is None else f"{name} (there is {relative}: another prefix)"


def _same(weights: WeightSource, one: str, other: str) -> bool:
    first, second = weights.entries[one], weights.entries[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return tensor_bytes(weights.read(one)) == tensor_bytes(weights.read(other))


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
