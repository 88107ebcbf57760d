"""HF PEFT's `adapter_config.json` for LoRA: which linears, which rank and alpha each; read and written.

The matching rules are peft 0.21's own: `target_modules` as a list matches a name or its dotted end, as a string the
whole name; `rank_pattern` and `alpha_pattern` match `(.*\\.)?(key)$`, the first key that does wins.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec

# Settings that change what the tensors mean; a value that counts as "off" for each is falsy.
REFUSED = {
    "use_qalora": "QA-LoRA (use_qalora) is not supported",
    "lora_bias": "a bias on B (lora_bias) is not supported",
    "trainable_token_indices": "trainable tokens (trainable_token_indices) are not supported",
    "layer_replication": "replicated layers (layer_replication) are not supported",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) is not supported",
    "use_bdlora": "block-diagonal LoRA (use_bdlora) is not supported",
    "arrow_config": "Arrow routing (arrow_config) is not supported",
    "kasa_config": "KaSA (kasa_config) is not supported",
    "velora_config": "VeLoRA (velora_config) is not supported",
    "monteclora_config": "MonteCLoRA (monteclora_config) is not supported",
}
# What makes a model of an adapter that is not read.
MERGE_WITH_PEFT = (
    "merge it with peft (merge_and_unload(), then save_pretrained()) and use the merged folder as policy.model_name"
)
# Kinds of peft that train inputs of the model, not its weights.
PROMPT_KINDS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CARTRIDGE")
# The setting that says that an adapter is of another kind than plain LoRA.
FLAG_OF_TYPE = {"dora": "use_dora"}
# Initialisations that change the base's weights too: peft would repeat the change on loading.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftPatterns:
    """What an adapter_config.json says of each linear, by peft's rules."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    type: str
    modules_to_save: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    # Rank and alpha of linears that are known without the patterns.
    sizes: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def parameters_named(self, name: str) -> list[str]:
        """Those of `target_parameters` that the parameter `name` is."""
        return [wanted for wanted in self.parameters if name == wanted or name.endswith(f".{wanted}")]

    def saves(self, tensor: str) -> bool:
        """Whether a tensor of the HF model is of a module that is trained whole; peft compares the ends of names."""
        module, _, parameter = tensor.rpartition(".")
        return ".lora_" not in tensor and parameter == "weight" and module.endswith(self.modules_to_save)

    def matches(self, name: str) -> bool:
        """Whether the linear `name` (as the HF model calls it) carries an adapter."""
        if name in self.sizes:
            return True
        if _names(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            return name != "lm_head"
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True
        if not _names(self.target_modules, name):
            return False
        return self.layers_to_transform is None or self._layer(name) in self.layers_to_transform

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        if name in self.sizes:
            return self.sizes[name]
        return (
            self.rank_pattern.get(_first_match(self.rank_pattern, name), self.rank),
            self.alpha_pattern.get(_first_match(self.alpha_pattern, name), self.alpha),
        )

    def _layer(self, name: str) -> int | None:
        """The layer number in a name as peft finds it: after a layers_pattern that matches, or the first number."""
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        for pattern in patterns:
            match = re.match(pattern, name)
            if match:
                return int(match[1])
        return None


def read_patterns(config: Mapping[str, Any]) -> PeftPatterns:
    """Parse an adapter_config.json's content. Raises UserError, by name, for whatever is not a plain LoRA adapter."""
    if config.get("peft_type") != "LORA":
        raise _other_kind(config.get("peft_type"))
    for key, reason in REFUSED.items():
        if config.get(key):
            raise UserError(f"{reason}: adapter_config.json has {key}={config[key]!r}; {MERGE_WITH_PEFT}")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"adapter_config.json has bias={config['bias']!r}: trained biases are not supported; {MERGE_WITH_PEFT}"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"adapter_config.json has init_lora_weights={init!r}, which also changed the base's weights; convert it to "
            "a plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if not config.get("target_modules") and not config.get("target_parameters"):
        raise UserError("adapter_config.json has no target_modules; is the file complete?")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return PeftPatterns(
        target_modules=_names_or_regex(config.get("target_modules") or ()),
        exclude_modules=_names_or_regex(config.get("exclude_modules") or ()),
        layers_to_transform=tuple(layers) if layers else None,
        layers_pattern=_tuple(config.get("layers_pattern") or ()),
        rank=_number(config, "r", int),
        alpha=_number(config, "lora_alpha", float),
        rank_pattern={key: int(value) for key, value in (config.get("rank_pattern") or {}).items()},
        alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        use_rslora=bool(config.get("use_rslora", False)),
        dropout=float(config.get("lora_dropout") or 0.0),
        modules_to_save=_tuple(config.get("modules_to_save") or ()),
        parameters=_tuple(config.get("target_parameters") or ()),
        type=next((name for name, flag in FLAG_OF_TYPE.items() if config.get(flag)), "lora"),
    )


def _other_kind(peft_type: Any) -> UserError:
    what_works = "LoRA is read, with rsLoRA, DoRA and modules_to_save, and PiSSA where it was saved as a plain LoRA"
    if peft_type in PROMPT_KINDS:
        fix = "it is no change of the weights, so it cannot be merged either: train a LoRA instead"
    else:
        fix = f"{MERGE_WITH_PEFT}, or train a LoRA instead"
    return UserError(f"adapter_config.json has peft_type={peft_type!r}, a kind that is not there: {what_works}; {fix}")


def build_config(
    spec: AdapterSpec,
    patterns: Mapping[str, tuple[int, float]],
    use_rslora: bool,
    all_names: Sequence[str],
    parameters: Sequence[str] = (),
    all_parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """adapter_config.json's content. patterns: adapted HF linear or parameter -> (rank, alpha). all_names: every linear
    there is. parameters: those of the adapted that are bare parameters; all_parameters: every one there is."""
    ranks = {name: rank for name, (rank, _) in patterns.items()}
    alphas = {name: _integral(alpha) for name, (_, alpha) in patterns.items()}
    post = spec.settings.get("dropout_position") == "post"
    linears = [name for name in patterns if name not in parameters]
    rank, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.base_model_name,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        **{flag: spec.type == name for name, flag in FLAG_OF_TYPE.items()},
        # peft drops A's input only, and not of parameters; a run that does otherwise has its setting in adapter.json.
        "lora_dropout": 0.0 if parameters or post else spec.settings.get("dropout", 0.0),
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": shortest_targets(linears, all_names, spec.shapes.tower),
        **({"target_parameters": _shortest_parameters(parameters, all_parameters)} if parameters else {}),
        "exclude_modules": None,
        "modules_to_save": [name.removesuffix(".weight") for name in spec.saved] or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }


def shortest_targets(adapted: Sequence[str], all_names: Sequence[str], tower: str = "") -> list[str] | str:
    """The shortest `target_modules` that matches exactly `adapted` among `all_names`.

    Last names where every layer has the linear; otherwise with layer numbers, as a list or as a regular expression,
    whichever has fewer characters. In a vision-language model, whose vision tower has linears of the same last names,
    a regular expression that begins with the language model's `tower`.
    """
    layers_with: dict[str, list[str]] = defaultdict(list)
    for name in adapted:
        layers_with[_leaf(name)].append(name)
    total = {leaf: sum(_leaf(name) == leaf for name in all_names) for leaf in layers_with}
    partial = {leaf for leaf, names in layers_with.items() if len(names) < total[leaf]}
    listed = [leaf for leaf in layers_with if leaf not in partial]
    if not partial and not tower:
        return listed
    listed += [name.removeprefix("model.") for leaf in sorted(partial) for name in layers_with[leaf]]
    by_layers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for leaf, names in layers_with.items():
        layers = tuple(_layer(name) for name in names) if leaf in partial else ()
        by_layers[layers].append(leaf)
    start = re.escape(tower) if tower else r".*\."
    alternatives = []
    for layers, leaves in by_layers.items():
        anywhere = rf"{start}.*\." if tower else r"(.*\.)?"
        path = rf"{start}layers\.({'|'.join(layers)})\..*\." if layers else anywhere
        # The head stands outside of a tower.
        outside = ["lm_head"] if tower and "lm_head" in leaves else []
        inside = [leaf for leaf in leaves if leaf not in outside]
        alternatives += [*outside, *([rf"{path}({'|'.join(inside)})"] if inside else [])]
    pattern = "|".join(alternatives)
    if tower:
        return pattern
    return pattern if len(pattern) < len(",".join(f'"{name}"' for name in listed)) else listed


def _shortest_parameters(adapted: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """Without the layers' numbers (`mlp.experts.gate_up_proj`) where every layer has it, else in full."""
    result: dict[str, None] = {}
    for name in adapted:
        end = re.sub(r"^.*?\.\d+\.", "", name)
        everywhere = [other for other in all_names if other.endswith(f".{end}")]
        result[end if set(everywhere) <= set(adapted) else name] = None
    return list(result)


def _default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and keys for the linears that have another. The keys exclude each other, so that their order
    (which peft does not keep when it saves) does not matter."""
    counts = list(values.values())
    default = max(dict.fromkeys(counts), key=counts.count)
    of_leaf: dict[str, set[Any]] = defaultdict(set)
    for name, value in values.items():
        of_leaf[_leaf(name)].add(value)
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        if value != default:
            pattern[_leaf(name) if len(of_leaf[_leaf(name)]) == 1 else name] = value
    return default, pattern


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _layer(name: str) -> str:
    found = re.search(r"\.layers\.(\d+)\.", name)
    assert found is not None
    return found[1]


def _names(wanted: str | Sequence[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def fits_end(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means the linear `name`. Raises re.error."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(keys: Mapping[str, Any], name: str) -> str:
    return next((key for key in keys if fits_end(key, name)), name)


def _names_or_regex(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _number(config: Mapping[str, Any], key: str, kind: type) -> Any:
    try:
        return kind(config[key])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"adapter_config.json needs a number in {key}, got {config.get(key)!r}") from error


def _integral(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
