"""Looks at a base's config and files before anything is loaded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.base_model import cached_folder
from megatron_lora.conversion.config_gate import WITHOUT_EFFECT, check_config
from megatron_lora.conversion.fingerprint import fingerprint_base
from megatron_lora.conversion.hf_model import ROPE_NAMES, HFModel, read_hf_model
from megatron_lora.conversion.inventory import kept_tensors, open_weights
from megatron_lora.errors import UserError
from megatron_lora.lora.families import unknown_reason

MEGATRON_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmoe",
    "gpt_oss",
    "glm4_moe",
    "deepseek_v3",
    "deepseek_v2",
    "glm4_moe_lite",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "nemotron",
    "nemotron_h",
    "exaone4",
    "exaone_moe",
    "ernie4_5_moe",
    "hy_v3",
    "minimax_m2",
)


def read_base(policy: PolicyConfig) -> HFModel:
    """The recipe's model as its config describes it. Raises UserError where there is none."""
    return read_hf_model(policy.model_name, f"policy.model_name={policy.model_name}", policy.hf_config_overrides)


def overridden_fields(policy: PolicyConfig, config: Any) -> dict[str, Any]:
    """Those fields of the base's transformers config that `policy.hf_config_overrides` replaced, for other readers of
    the model's folder."""
    names = [name for name in policy.hf_config_overrides if name not in WITHOUT_EFFECT]
    names = dict.fromkeys("rope_parameters" if name in ROPE_NAMES else name for name in names)
    return {name: getattr(config, name) for name in names}


def check_base(policy: PolicyConfig, model: HFModel) -> list[str]:
    """Notices for the user. Raises UserError for a family that the backend lacks, a config that it does not honour, and
    weights that are missing, cut short or not this model's. A hub name's weights are checked when they are here."""
    megatron = policy.backend == "megatron"
    reason = unknown_reason(model.family)
    if reason is not None:
        raise UserError(
            f"policy.model_name={policy.model_name!r} is a {model.family!r} model, which neither backend trains"
            f"{reason}; use one of {', '.join(MEGATRON_FAMILIES)}"
        )
    if megatron and model.family not in MEGATRON_FAMILIES:
        raise UserError(
            f"policy.model_name={policy.model_name!r} is a {model.family!r} model; the Megatron backend trains "
            f"{', '.join(MEGATRON_FAMILIES)}; use one of these, or the other backend "
            "(policy.megatron_cfg.enabled=false)"
        )
    if model.tower and not policy.adapter.enabled:
        raise UserError(
            f"policy.model_name={policy.model_name!r} is a vision-language model, whose language model trains through "
            f"adapters alone: {policy.adapter_section}.enabled=false is full fine-tuning; set enabled=true"
        )
    notices = check_config(model, megatron=megatron, max_length=policy.max_total_sequence_length)
    folder = Path(model.source)
    if not folder.is_dir():
        folder = cached_folder(model.source)
    if folder is not None:
        kept = kept_tensors(model, open_weights(model, folder))
        if kept and model.tower:
            notices.append(
                f"{policy.model_name} is a vision-language model: its language model trains, on text; the other "
                f"{len(kept)} tensors ({kept[0]}, ...) stay as they are, and a merged export has them"
            )
        elif kept:
            notices.append(
                f"{len(kept)} tensors of {policy.model_name} ({kept[0]}, ...) are of layers that predict further "
                "tokens: they are not computed here, stay as they are, and a merged export has them"
            )
    return notices


def check_token_ids(model: HFModel, tokenizer: Any, datasets: Iterable[tuple[str, Any]]) -> list[str]:
    """Notices for the user. datasets: (how messages name it, data set). Raises UserError for a token that training
    would look up beyond the model's embedding."""
    rows = model.shapes.vocab_size
    fix = "use the tokenizer that belongs to the model, or resize the model's embedding to it"
    for kind in ("eos", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id >= rows:
            raise UserError(
                f"the tokenizer's {kind}_token {getattr(tokenizer, f'{kind}_token')!r} has id {token_id}, beyond the "
                f"embedding of the model (vocab_size={rows}); {fix}"
            )
    for name, dataset in datasets:
        found = dataset.first_id_from(rows)
        if found is not None:
            number, token_id = found
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise UserError(
                f"{name}, row {number}: token {token!r} has id {token_id}, beyond the embedding of the model "
                f"(vocab_size={rows}); {fix}"
            )
    if len(tokenizer) > rows:
        return [
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; no row uses one beyond it"
        ]
    return []


def check_positions(model: HFModel, longest: int) -> list[str]:
    """Notices for the user. longest: tokens of a sequence."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or longest <= positions:
        return []
    return [
        f"sequences of up to {longest} tokens are longer than the {positions} positions that the model was made for "
        "(max_position_embeddings): it has not learned those beyond; lower policy.max_total_sequence_length, or "
        "stretch its positions (YaRN) with policy.hf_config_overrides"
    ]


def local_fingerprint(model_name: str) -> str | None:
    """The fingerprint of a local base, kept with its adapters; None for a hub name."""
    folder = Path(model_name).expanduser()
    return fingerprint_base(folder) if folder.is_dir() else None


def known_fingerprint(model_name: str) -> str | None:
    """As `local_fingerprint`, also of a hub name whose files are on this machine."""
    if (found := local_fingerprint(model_name)) is not None:
        return found
    folder = cached_folder(model_name)
    return None if folder is None else fingerprint_base(folder)
