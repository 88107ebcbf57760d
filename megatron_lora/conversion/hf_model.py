"""A Hugging Face model as its config describes it, without weights. Code that lies in the folder is never run."""

import contextlib
import copy
import dataclasses
import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_lora.conversion.config_overrides import ROPE_DICTS, overridden
from megatron_lora.conversion.tower import TOWER, WITH_TOWER, LanguageTower, text_config, text_content, with_text
from megatron_lora.errors import UserError, first_line
from megatron_lora.lora.describe import describe_config
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.lora.model_tables import GATED_ATTENTION, SOFTMAX_AND_BIAS

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
BIAS_SWITCHES = {"attention_bias", "mlp_bias"}
QUANTIZATION = "quantization_config"
# Families whose layers may see a window only: one for all layers, or those that `layer_types` names.
_WINDOW_EVERYWHERE = ("mistral", "qwen3_moe")
_WINDOW_BY_LAYER = ("qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "exaone4", "exaone_moe")
# Families of which, where some layers have a window, the others have no rotary embeddings.
_WINDOWS_ALONE_ROTATE = ("exaone4", "exaone_moe")
# Families whose attention turns the first features of a head only, where `partial_rotary_factor` says so.
PARTIAL_ROTARY = ("glm4_moe", "nemotron", "minimax_m2", *GATED_ATTENTION)
_SOFTCAPPED = ("gemma2", "gemma3_text")
# What an override may name although no class declares it: older spellings of `rope_parameters`.
ROPE_NAMES = (*ROPE_DICTS, "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
# Of the coefficient of routers' auxiliary loss: transformers' name, and the one in DeepSeek's files.
BALANCING = ("router_aux_loss_coef", "aux_loss_alpha")
_ACTIVATION_FIELDS = {
    "gemma2": "hidden_activation",
    "gemma3_text": "hidden_activation",
    "nemotron_h": "mlp_hidden_act",
}
_NORM_EPS_FIELDS = {"nemotron": "norm_eps", "nemotron_h": "layer_norm_epsilon"}


@dataclass(frozen=True)
class Routing:
    """A token's choice of experts: those of the highest scores, to which a bias is added where they are `biased`.

    score: the function that makes scores of the router's logits. normalized: the weights of a token's experts sum to 1.
    scale: what they are multiplied by then. groups, chosen_groups: experts are chosen from the best of equal groups,
    which the sum of their two best experts ranks.
    """

    score: Literal["softmax", "sigmoid"]
    normalized: bool
    biased: bool
    scale: float
    groups: int
    chosen_groups: int


@dataclass(frozen=True)
class HFModel:
    """source: the folder or hub name. content: config.json as it is written, with `overrides` in it. config:
    transformers' object of it. overrides: fields that the recipe replaced. Of a vision-language model content and
    config are its language model's, and tower is the place of that in it: see `conversion.tower`."""

    source: str
    content: Mapping[str, Any]
    config: Any
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tower: str = ""

    @property
    def config_name(self) -> str:
        """How messages name what describes the model."""
        return f"{self.source}/config.json{' with policy.hf_config_overrides' if self.overrides else ''}"

    @property
    def family(self) -> str:
        return self.config.model_type

    @cached_property
    def shapes(self) -> ModelSpec:
        """Raises UserError for a family whose linears are not known here."""
        content = self.config.to_dict()
        declared = {item.name for item in dataclasses.fields(self.config)}
        # transformers keeps these of a family whose class does not have them, and does not apply them.
        for name in BIAS_SWITCHES - declared:
            content.pop(name, None)
        return describe_config(content, self.tower)

    @cached_property
    def empty(self) -> Any:
        """transformers' own model, parameters on the meta device. Raises UserError where it cannot be built."""
        return build_empty(self, attn_implementation="eager")

    @property
    def stored_four_bit(self) -> bool:
        """Whether its linears are stored in bitsandbytes' 4-bit form."""
        return is_four_bit(self.content.get(QUANTIZATION))

    @property
    def activation_field(self) -> str:
        return _ACTIVATION_FIELDS.get(self.family, "hidden_act")

    @property
    def activation_name(self) -> str:
        return getattr(self.config, self.activation_field)

    @property
    def norm_eps_field(self) -> str:
        return _NORM_EPS_FIELDS.get(self.family, "rms_norm_eps")

    @property
    def norm_eps(self) -> float:
        return getattr(self.config, self.norm_eps_field)

    @property
    def windows(self) -> list[int | None]:
        """How many tokens back, itself included, a token of each layer sees; None for all."""
        layers, window = self.config.num_hidden_layers, getattr(self.config, "sliding_window", None)
        if self.family in _WINDOW_EVERYWHERE:
            return [window] * layers
        if self.family in _WINDOW_BY_LAYER:
            return [window if kind == "sliding_attention" else None for kind in self.config.layer_types]
        return [None] * layers

    @property
    def unrotated(self) -> list[bool]:
        """Whether attention of each layer goes without the rotary embeddings that the others have."""
        alone = self.family in _WINDOWS_ALONE_ROTATE and self.config.sliding_window is not None
        return [alone and window is None for window in self.windows]

    @property
    def final_softcap(self) -> float | None:
        """c, where logits x become c tanh(x / c) (Gemma 2)."""
        return self.config.final_logit_softcapping if self.family in _SOFTCAPPED else None

    @property
    def attention_softcap(self) -> float | None:
        """c, where scores x of attention become c tanh(x / c) (Gemma 2; Gemma 3 has the field and does not use it)."""
        return self.config.attn_logit_softcapping if self.family == "gemma2" else None

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by, but for a factor on rotary embeddings."""
        mixers = (getattr(layer, "self_attn", getattr(layer, "mixer", None)) for layer in self.empty.model.layers)
        scales = (mixer.scaling for mixer in mixers if mixer is not None and hasattr(mixer, "scaling"))
        # Nemotron's class divides by the root of the head's size in its forward pass.
        return float(next(scales, self.shapes.head_dim**-0.5))

    @property
    def rotary_percent(self) -> float:
        """The part of a head's features that rotary embeddings turn, 1 for all."""
        frequencies, _ = next(iter(self.rotary.values()))
        return 2 * frequencies.numel() / self.shapes.head_dim

    @property
    def routing(self) -> Routing:
        """How its tokens choose their experts. The model has experts."""
        config = self.config
        biased = any(other.name.endswith("router.expert_bias") for other in self.shapes.others)
        grouped = hasattr(config, "n_group") and self.family != "deepseek_v2"
        return Routing(
            score="sigmoid" if biased and self.family != SOFTMAX_AND_BIAS else "softmax",
            # DeepSeek-V2's class has the switch and does not apply it, GPT-OSS' has none.
            normalized=bool(getattr(config, "norm_topk_prob", True)) and self.family != "deepseek_v2",
            biased=biased,
            scale=float(getattr(config, "routed_scaling_factor", getattr(config, "router_scaling_factor", 1.0))),
            groups=(config.n_group or 1) if grouped else 1,
            chosen_groups=(config.topk_group or 1) if grouped else 1,
        )

    @property
    def balancing_coefficient(self) -> float:
        """Of the router's auxiliary loss, where a recipe that has it names none: config.json's, and megatron-bridge's
        where that has none."""
        found = [getattr(self.config, name) for name in BALANCING if getattr(self.config, name, None) is not None]
        return float(found[0]) if found else 0.001

    @cached_property
    def rotary(self) -> dict[str, tuple[Tensor, float]]:
        """Layer type ("" where all layers have the same) -> (rotary frequencies [head_dim / 2] fp32, the factor on
        cosine and sine), as transformers computes them. Empty for a model without positions (a hybrid)."""
        result: dict[str, tuple[Tensor, float]] = {}
        if self.shapes.mixers:
            return result
        module = self.empty.model.rotary_emb
        for name, buffer in module.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                kind = name.removesuffix("inv_freq").rstrip("_")
                factor = getattr(module, f"{kind}_attention_scaling" if kind else "attention_scaling")
                result[kind] = (buffer, float(factor))
        return result


def read_hf_model(source: str | Path, what: str | None = None, overrides: Mapping[str, Any] | None = None) -> HFModel:
    """The model of a local folder (`~` stands for the home folder) or of a hub name, of which config.json is fetched.

    what: how messages name it. overrides: fields that replace config.json's (`policy.hf_config_overrides`). Raises
    UserError where there is no config that transformers takes, and for an override that its class does not know.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig  # slow to import

    what = what or f"the model {source}"
    place = _check_place(str(source), what)
    try:
        content, _ = PreTrainedConfig.get_config_dict(place)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{what} is no folder or hub model that loads (config.json): {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} is no folder or hub model that loads: config.json is no JSON object")
    content.pop("_commit_hash", None)
    family: Any = content.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        named = "has no model_type" if family is None else f"names model_type={family!r}, which transformers lacks"
        custom = "; it comes with code of its own (auto_map), which is never run" if "auto_map" in content else ""
        raise UserError(
            f"{what} is no folder or hub model that loads: its config.json {named}{custom}; use a Llama, Mistral, "
            "Qwen2, Qwen3 or Gemma 3 model"
        )
    in_tower = family in WITH_TOWER
    if overrides:
        language = CONFIG_MAPPING[family].sub_configs["text_config"] if in_tower else CONFIG_MAPPING[family]
        _check_overrides(overrides, content, language)
        content = with_text(content, overridden(text_content(content), overrides))
    # A known family needs no code from the folder.
    plain = {key: copy.deepcopy(value) for key, value in content.items() if key not in ("auto_map", QUANTIZATION)}
    try:
        with _quiet():
            config = CONFIG_MAPPING[family].from_dict(plain)
            if in_tower:
                config = text_config(config)
    except Exception as error:  # a field of the user's may raise anything in transformers' own code
        sizes = ", ".join(f"{name}={plain[name]!r}" for name in SIZES if name in plain)
        with_overrides = f" with policy.hf_config_overrides={dict(overrides)}" if overrides else ""
        raise UserError(
            f"{what}: transformers does not take its config.json{with_overrides}: {one_line(error)} "
            f"(its sizes: {sizes or 'none'})"
        ) from error
    if in_tower:
        quantization = {key: content[key] for key in (QUANTIZATION,) if key in content}
        content = text_content(content) | quantization
    return HFModel(place, content, config, dict(overrides or {}), TOWER if in_tower else "")


def _check_overrides(overrides: Mapping[str, Any], content: Mapping[str, Any], family: Any) -> None:
    known = {entry.name for entry in fields(family)} | {*ROPE_NAMES, *BALANCING}
    for name in overrides:
        if name == "model_type" and overrides[name] != content["model_type"]:
            raise UserError(
                f"policy.hf_config_overrides.model_type={overrides[name]!r}: the model is a {content['model_type']!r} "
                "model, which no key changes; leave it out, or name another model in policy.model_name"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            raise UserError(
                f"policy.hf_config_overrides.{name}: transformers' {family.__name__} has no such field; "
                + (f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}")
            )
    if all(name in overrides for name in ROPE_DICTS):
        raise UserError("policy.hf_config_overrides has rope_scaling and rope_parameters, two names of one; give one")


def is_four_bit(quantization: Any) -> bool:
    """Whether a `quantization_config` is of bitsandbytes' 4-bit form, the only one that is read."""
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "bitsandbytes"
        and bool(quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"))
    )


def build_empty(model: HFModel, **options: Any) -> Any:
    """transformers' model with parameters on the meta device and real buffers (rotary frequencies are in no
    checkpoint). options: of `AutoModelForCausalLM.from_config`. Raises UserError where it cannot be built."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    # What a forward returns is the caller's business, not the folder's.
    config.return_dict, config.output_hidden_states, config._output_attentions = True, False, False
    try:
        with init_empty_weights(include_buffers=False), _quiet():
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # as above
        raise UserError(
            f"{model.source}: transformers cannot build the model that config.json describes "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    if model.tower:
        empty.model = LanguageTower(empty.model)
    if config.tie_word_embeddings:
        empty.lm_head.weight = empty.model.embed_tokens.weight
    return empty


def activation(name: str) -> Any:
    """transformers' activation function of that name. Raises KeyError where there is none."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def _check_place(source: str, what: str) -> str:
    """The folder with `~` resolved, or the hub name."""
    source = os.path.expanduser(source)
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{what}: the folder has no config.json; give a Hugging Face folder")
    elif folder.is_file():
        raise UserError(f"{what} is a file; give the folder that holds config.json")
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{what}: there is no such folder; check the path")
    return source


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of what the gate answers for."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
