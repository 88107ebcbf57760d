"""Adapter checkpoint -> HF PEFT adapter, or -> merged HF model; and an HF PEFT adapter -> adapter checkpoint.

The entry points carry NeMo RL's names and keyword names, so that its callers work unchanged.
"""

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_lora.checksums import check_as_written, seal
from megatron_lora.conversion.adapter_checkpoint import (
    newest_steps,
    read_adapter,
    read_plain_adapter,
    weights_folder,
    write_adapter,
)
from megatron_lora.conversion.base_model import find_adapter, find_base
from megatron_lora.conversion.fingerprint import fingerprint_adapter, fingerprint_stream, fingerprint_weights
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.conversion.inventory import open_weights
from megatron_lora.conversion.merge import Merger
from megatron_lora.conversion.model_source import as_trained_over, check_base, open_base, overrides_of_run
from megatron_lora.conversion.output_folder import output_folder
from megatron_lora.conversion.safetensors_io import read_header, read_tensor, write_tensor_dict
from megatron_lora.conversion.saved_modules import check_saved
from megatron_lora.conversion.tokenizer_files import copy_run_tokenizer
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.merge import merge_targets
from megatron_lora.lora.peft_format import ExpertLayout, to_hf
from megatron_lora.lora.peft_reading import from_hf

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FINGERPRINT = "adapter_fingerprint"  # in the metadata of a file of adapters, or of a merged model
EXPERT_LAYOUT = "expert_layout"  # likewise: `peft_format.ExpertLayout`
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_lora_adapter_to_hf(
    *,
    adapter_ckpt: str,
    hf_ckpt_path: str,
    hf_model_name: str | None = None,
    base_ckpt: str | None = None,
    uniform_scale: bool = False,
    expert_layout: ExpertLayout = "packed",
    check_logits: bool = False,
) -> str:
    """Write an adapter checkpoint as an HF PEFT folder, without the base model; returns hf_ckpt_path.

    adapter_ckpt: a run's step_N folder. hf_model_name: the base model's name to write, by default the one trained on.
    base_ckpt: the base (HF folder or Megatron checkpoint), checked against the adapter. check_logits: compare a forward
    of both sides (loads the base). uniform_scale: one scale for all linears; expert_layout: one pair of factors for
    each tensor of all experts, or a pair for each expert's linears; see `to_hf`. Raises UserError; writes all or
    nothing.
    """
    layouts = get_args(ExpertLayout)
    if expert_layout not in layouts:
        raise UserError(
            f"expert_layout={expert_layout!r} is no form of adapters on experts; use {' or '.join(layouts)}"
        )
    with output_folder(hf_ckpt_path) as out:
        spec, factors = _read_checked(adapter_ckpt)
        spec.base_model_name = hf_model_name or spec.base_model_name
        overrides = _overrides(adapter_ckpt)
        if overrides:
            logger.warning(
                "the adapter was trained on a base whose config.json was read with %s (policy.hf_config_overrides); "
                "whoever loads it sets the same on the base",
                overrides,
            )
        if base_ckpt is not None or check_logits:
            base = as_trained_over(spec, open_base(base_ckpt, hf_model_name, spec.base_model_name, overrides))
            check_base(spec, base)
        if expert_layout == "each" and any(spec.shapes.linear(module.kind).packed for module in spec.modules):
            raise UserError(
                f"expert_layout=each: the experts of a {spec.shapes.model_type} model are one tensor a layer in its "
                "files too, and no model has linears of each; use packed"
            )
        config, tensors = to_hf(spec, factors, uniform_scale=uniform_scale, experts=expert_layout)
        if not check_logits:
            factors.clear()
        write_peft_folder(out, config, tensors)
        copy_run_tokenizer(Path(adapter_ckpt), out)
        if check_logits:
            from megatron_lora.conversion.logit_check import check_adapter_logits

            with base.as_hf_folder(out.parent) as folder:
                logger.info("logits agree to %.1e", check_adapter_logits(folder, spec, factors, out))
    return str(hf_ckpt_path)


def _overrides(adapter_ckpt: str) -> dict[str, Any]:
    return overrides_of_run(weights_folder(adapter_ckpt).parent.parent)


def _read_checked(adapter_ckpt: str) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """`read_plain_adapter` of files that are as they were written. Raises UserError."""
    found = read_plain_adapter(adapter_ckpt)
    check_as_written(weights_folder(adapter_ckpt))
    return found


def write_peft_folder(out: Path, config: dict, tensors: dict[str, Tensor]) -> str:
    """Write adapter_config.json and adapter_model.safetensors into the folder `out`, read them back and compare.

    Returns the adapter's fingerprint, which is in the file's metadata too. Raises UserError where a tensor is not
    finite, RuntimeError where the file does not hold what was to be written.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds NaN or infinity; the adapter is unusable, export an earlier step")
    out.mkdir(parents=True, exist_ok=True)
    fingerprint = fingerprint_adapter(tensors)
    write_tensor_dict(out / ADAPTER_WEIGHTS, tensors, {FINGERPRINT: fingerprint} | _expert_layout(tensors))
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    entries, _ = read_header(out / ADAPTER_WEIGHTS)
    written = fingerprint_stream((name, read_tensor(entries[name])) for name in sorted(entries))
    if written != fingerprint:
        raise RuntimeError(f"self-check failed: {out / ADAPTER_WEIGHTS} does not hold the tensors given to it")
    return fingerprint


def _expert_layout(tensors: Collection[str]) -> dict[str, str]:
    """How an adapter has the factors of experts, for the file's metadata; nothing without any."""
    names = [name for name in tensors if ".experts." in name]
    each = any(re.search(r"\.experts\.\d+\.", name) for name in names)
    return {EXPERT_LAYOUT: "each" if each else "packed"} if names else {}


def merge_lora_to_hf(
    *,
    adapter_ckpt: str,
    hf_ckpt_path: str,
    hf_model_name: str | None = None,
    base_ckpt: str | None = None,
    dtype: str | None = None,
    check_logits: bool = False,
    show_progress: bool = True,
) -> str:
    """Write base + adapter as a plain HF model, merged in fp32, one tensor at a time; returns hf_ckpt_path.

    The base is base_ckpt (an HF folder or a Megatron checkpoint), else hf_model_name, else the model named in the
    checkpoint; an adapter that was trained over 4-bit values is merged into those, made dense. dtype: `bfloat16`,
    `float16` or `float32`; by default each tensor's own. Raises UserError; writes all or nothing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"dtype={dtype!r} is none that a merged model is written in; use one of {', '.join(DTYPES)} (not 4 bits: "
            "rounding the sum again would lose most of the update; export the adapter to serve it over a 4-bit base)"
        )
    target = None if dtype is None else DTYPES[dtype]
    with output_folder(hf_ckpt_path) as out:
        spec, factors = _read_checked(adapter_ckpt)
        overrides = _overrides(adapter_ckpt)
        base = as_trained_over(spec, open_base(base_ckpt, hf_model_name, spec.base_model_name, overrides))
        check_base(spec, base)
        merger = Merger(spec, factors, base.weights, target)
        metadata = {FINGERPRINT: fingerprint_adapter(factors)}
        base.copy_small_files(out, target)
        copy_run_tokenizer(Path(adapter_ckpt), out)
        merger.write(out, metadata, show_progress=show_progress)
        logger.info("%s", merger.report)
        if check_logits:
            from megatron_lora.conversion.logit_check import check_merged_logits

            coarsest = max(
                (merger.target_dtype(name) for name in (*merger.adapted, *spec.saved)), key=lambda d: torch.finfo(d).eps
            )
            with base.as_hf_folder(out.parent) as folder:
                logger.info("logits agree to %.1e", check_merged_logits(folder, spec, factors, out, coarsest))
    return str(hf_ckpt_path)


def import_hf_adapter(
    *, hf_adapter: str, adapter_ckpt_path: str, hf_model_name: str | None = None, base_ckpt: str | None = None
) -> str:
    """Write an HF PEFT adapter folder as an adapter checkpoint (`policy/weights/` in it); returns adapter_ckpt_path.

    The base's config gives the shapes; its weights, where they are local, the fingerprint. Raises UserError.
    """
    with output_folder(adapter_ckpt_path) as out:
        config, tensors = read_peft_folder(Path(hf_adapter))
        trained_on = config.get("base_model_name_or_path") or ""
        base = find_base(base_ckpt, hf_model_name, trained_on, weights=False)
        model = read_hf_model(base)
        has_weights = any(base.glob("*.safetensors"))
        fingerprint = fingerprint_weights(open_weights(model, base)) if has_weights else None
        name = hf_model_name or trained_on or str(base)
        spec, factors = from_hf(config, tensors, model.shapes, name, fingerprint)
        check_saved(model.shapes, spec.saved, list(merge_targets(spec)), f"{hf_adapter}, modules_to_save")
        write_adapter(out / "policy" / "weights", spec, factors)
        _check_import(out, spec, factors)
        seal(out)
    return str(adapter_ckpt_path)


def read_peft_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json's content, tensors) of an HF PEFT folder or a hub name. Raises UserError where a file is
    missing, damaged, or not as this project wrote it."""
    folder = find_adapter(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        steps = [step / "hf_adapter" for step in (folder, *newest_steps(folder))]
        meant = next((f"; did you mean {one}?" for one in steps if (one / ADAPTER_CONFIG).is_file()), "")
        raise UserError(f"{folder} is no HF PEFT adapter folder: it holds no {ADAPTER_CONFIG}{meant}")
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder} holds adapter_model.bin; load it in peft and save it again as {ADAPTER_WEIGHTS}")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} is damaged: {error}") from error
    check_as_written(folder)
    entries, metadata = read_header(folder / ADAPTER_WEIGHTS)
    tensors = {name: read_tensor(entry) for name, entry in entries.items()}
    # What other tools write, or save again, has no fingerprint.
    stored = metadata.get(FINGERPRINT)
    if stored is not None and stored != fingerprint_adapter(tensors):
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS} is not as it was written: its tensors do not have the fingerprint in its "
            "header; restore it from a copy, or export the checkpoint again"
        )
    return config, tensors


def _check_import(out: Path, spec: AdapterSpec, factors: dict[str, Tensor]) -> None:
    read_spec, read_factors = read_adapter(weights_folder(out))
    if read_spec != spec or fingerprint_adapter(read_factors) != fingerprint_adapter(factors):
        raise RuntimeError(f"self-check failed: {out} does not hold the adapter given to it")
