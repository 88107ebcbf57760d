"""HF model -> Megatron checkpoint -> HF model, bit for bit, one tensor at a time."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_lora.checksums import seal
from megatron_lora.conversion.base_model import find_base
from megatron_lora.conversion.fingerprint import fingerprint_weights
from megatron_lora.conversion.four_bit_folder import FourBitFolder
from megatron_lora.conversion.inventory import kept_tensors, open_model
from megatron_lora.conversion.megatron_weights import MegatronWeights
from megatron_lora.conversion.model_names import ModelParameter, fuse, kept_parameter, model_parameters
from megatron_lora.conversion.model_source import (
    HF_FOLDER,
    NAMES,
    SOURCE_FILE,
    ModelSource,
    open_checkpoint,
    write_config_dtype,
)
from megatron_lora.conversion.output_folder import output_folder
from megatron_lora.conversion.safetensors_io import tensor_bytes
from megatron_lora.conversion.shard_writer import check_shards, progress_bar, write_shards
from megatron_lora.conversion.torch_dist import StoredTensor, write_torch_dist
from megatron_lora.conversion.tower import file_names, has_file_names
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.lora.sharding import placement

logger = logging.getLogger(__name__)

# Checked for NaN at a time: the check's own temporaries are several times what it looks at.
CHECKED_ROWS = 4096


def convert_hf_to_megatron(
    *, hf_model_name: str, megatron_ckpt_path: str, tp: int = 1, pp: int = 1, show_progress: bool = True
) -> str:
    """Write an HF model as a Megatron checkpoint that any layout loads; returns megatron_ckpt_path.

    hf_model_name: a folder or a hub name. tp, pp: the layout meant for training; checked against the model, the files
    do not depend on them. Raises UserError; writes all or nothing.
    """
    with output_folder(megatron_ckpt_path) as out:
        folder = find_base(None, hf_model_name, hf_model_name)
        model, stored = open_model(hf_model_name, folder)
        if isinstance(stored, FourBitFolder):
            raise UserError(
                f"{folder} holds its linears in 4 bits, a Megatron checkpoint holds them dense; train adapters over "
                "the folder itself, or convert the model in bfloat16"
            )
        source = ModelSource(folder, stored)
        shapes = model.shapes
        _check_layout(shapes, tp, pp)
        parameters = model_parameters(shapes)
        parameters += [kept_parameter(name, tuple(stored.entries[name].shape)) for name in kept_tensors(model, stored)]
        weights = out / "policy" / "weights"
        _write_weights(weights, parameters, source.weights, shapes, show_progress)
        (out / HF_FOLDER).mkdir()
        source.copy_small_files(out / HF_FOLDER)
        record: dict[str, Any] = {"hf_model_name": hf_model_name, "fingerprint": fingerprint_weights(source.weights)}
        if has_file_names(shapes):
            record[NAMES] = dataclasses.asdict(file_names([entry.name for entry in stored], folder, shapes))
        (out / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        _check_same_weights(source.weights, MegatronWeights(weights, shapes), show_progress)
        seal(out)
    return str(megatron_ckpt_path)


def convert_megatron_to_hf(
    *, megatron_ckpt_path: str, hf_ckpt_path: str, hf_model_name: str | None = None, show_progress: bool = True
) -> str:
    """Write a whole model's checkpoint as an HF folder; returns hf_ckpt_path.

    megatron_ckpt_path: what `convert_hf_to_megatron` wrote, or a step_N folder of full fine-tuning. hf_model_name:
    where config and tokenizer are, by default beside the weights or what the run's config.yaml names. Raises UserError;
    writes all or nothing.
    """
    with output_folder(hf_ckpt_path) as out:
        source = open_checkpoint(megatron_ckpt_path, hf_model_name)
        described = {name: (entry.dtype, entry.shape) for name, entry in source.weights.entries.items()}
        source.copy_small_files(out)
        _name_dtype(out, source.weights)
        write_shards(
            out, source.weights, described, source.weights.read, title="converting", show_progress=show_progress
        )
        check_shards(out, source.weights, described)
        _, written = open_model(out, out)
        _check_same_weights(source.weights, written, show_progress)
    return str(hf_ckpt_path)


def _check_layout(shapes: ModelSpec, tp: int, pp: int) -> None:
    if tp < 1 or pp < 1:
        raise UserError(f"--tp {tp} --pp {pp}: both must be at least 1")
    for linear in (linear for linear in shapes.linears[:-1] if not linear.experts):
        placement("B", linear.kind, shapes, 0, tp)
        placement("A", linear.kind, shapes, 0, tp)
    if pp > shapes.num_layers:
        raise UserError(f"--pp {pp} is above the model's {shapes.num_layers} layers; use at most {shapes.num_layers}")


def _write_weights(
    folder: Path, parameters: list[ModelParameter], weights: WeightSource, shapes: ModelSpec, show_progress: bool
) -> None:
    by_name = {parameter.name: parameter for parameter in parameters}
    entries = {}
    for parameter in parameters:
        entries[parameter.name] = StoredTensor(weights.entries[parameter.hf_names[0]].dtype, parameter.shape)
    with progress_bar(show_progress) as progress:
        task = progress.add_task("converting", total=len(parameters))

        def read(name: str) -> torch.Tensor:
            parts = [weights.read(part) for part in by_name[name].hf_names]
            for part, part_name in zip(parts, by_name[name].hf_names, strict=True):
                if not all(torch.isfinite(piece).all() for piece in part.split(CHECKED_ROWS)):
                    raise UserError(f"{part_name} in {weights.folder} holds NaN or infinity; the model is unusable")
            progress.advance(task)
            return fuse(by_name[name], parts, shapes)

        write_torch_dist(folder, entries, read)


def _check_same_weights(source: WeightSource, written: WeightSource, show_progress: bool) -> None:
    """Every tensor that was written is the source's, bit for bit. Raises RuntimeError where one is not."""
    with progress_bar(show_progress) as progress:
        task = progress.add_task("checking", total=len(written.entries))
        # In the order of the fused side, so that each fused tensor is read once.
        order = source if isinstance(source, MegatronWeights) else written
        for names in order.shards.values():
            for name in names:
                expected, found = source.read(name), written.read(name)
                if expected.dtype != found.dtype or tensor_bytes(expected) != tensor_bytes(found):
                    raise RuntimeError(f"self-check failed: {name} in {written.folder} is not what it should be")
                progress.advance(task)


def _name_dtype(folder: Path, weights: WeightSource) -> None:
    """Training may have another dtype than the model it began with; then config.json says so."""
    dtypes = {entry.dtype for entry in weights.entries.values()}
    config = json.loads((folder / "config.json").read_text())
    named = config.get("dtype") or config.get("torch_dtype")
    if len(dtypes) == 1 and named != str(only := dtypes.pop()).removeprefix("torch."):
        write_config_dtype(folder, only)
