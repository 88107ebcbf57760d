"""The adapters: `policy.megatron_cfg.peft` and `policy.dtensor_cfg.lora_cfg`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_lora.config.schema_base import Fraction, Place, PositiveFloat, PositiveInt, Section

DTYPES = ("float32", "bfloat16", "float16")
InitMethod = Literal["xavier", "uniform", "normal", "zero"]
DropoutPosition = Literal["pre", "post"]


def _starting_values(value: str) -> str:
    if re.fullmatch(r"pissa(_niter_\d+)?", value) is None:
        raise ValueError("wanted pissa, pissa_niter_N (N subspace iterations) or null")
    return value


InitLoraWeights = Annotated[str, AfterValidator(_starting_values)]
AdapterType = Literal["lora", "canonical_lora", "dora"]
# What other projects have as kinds, and is a key of its own here.
KEY_OF_KIND = {
    "qlora": "type=lora with quantization=nf4 and lora_dtype",
    "qdora": "type=dora with quantization=nf4 and lora_dtype",
    "rslora": "type=lora with use_rslora=true",
    "loraplus": "type=lora with lora_plus_ratio=16",
    "pissa": "type=lora with init_lora_weights=pissa",
}


def _kind(value: Any) -> Any:
    key = KEY_OF_KIND.get(value.lower().replace("_", "").replace("+", "plus")) if isinstance(value, str) else None
    if key is not None:
        raise ValueError(f"{value} is not a kind of its own here; set {key}")
    return value


def _dtype_name(value: Any) -> Any:
    """The bare name of a dtype; YAML makes text of a bare `None`, which NeMo RL's recipes have."""
    if value is None or value in ("None", "none", "null"):
        return None
    if isinstance(value, str) and value.removeprefix("torch.") in DTYPES:
        return value.removeprefix("torch.")
    raise ValueError(f"wanted null or one of {', '.join(DTYPES)}")


def _module_patterns(value: Any) -> Any:
    """peft's `all-linear`, alone or in a list, and null are this project's empty list."""
    if value is None or value in ("all-linear", ["all-linear"]):
        return []
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",")]
        names = [name if name.isidentifier() else f"'{name}'" for name in names]  # YAML takes * for something else
        raise ValueError(f"wanted a list: [{', '.join(names)}]")
    if isinstance(value, list) and "all-linear" in value:
        raise ValueError("all-linear already stands for every linear; leave out the rest")
    return value


ModulePatterns = Annotated[list[str], BeforeValidator(_module_patterns)]


def _module_names(value: Any) -> Any:
    if value is None:
        return []
    if isinstance(value, str):
        raise ValueError(f"wanted a list: [{value}]")
    return value


def _no_biases(value: Any) -> Any:
    if value not in (None, "none"):
        raise ValueError("wanted none: trained biases are not there; name what trains whole in modules_to_save")
    return "none"


class _Adapter(Section):
    enabled: bool = Field(default=False, description="Train adapters; off: full fine-tuning.")
    type: Annotated[AdapterType, BeforeValidator(_kind)] = Field(
        default="lora",
        description="Kind of adapter: `lora` (q, k, v and gate, up share one A), `canonical_lora` (each its own A), "
        "`dora` (LoRA and a trained magnitude a row).",
    )
    target_modules: ModulePatterns = Field(
        default_factory=list,
        description="Linears to adapt: names (`linear_qkv` or `q_proj`), full paths or wildcards; empty or "
        "`all-linear`: every linear of attention and MLP.",
    )
    exclude_modules: ModulePatterns = Field(
        default_factory=list,
        description="Linears left alone, in the same forms; needs empty `target_modules`.",
    )
    modules_to_save: Annotated[list[str], BeforeValidator(_module_names)] = Field(
        default_factory=list,
        description="Modules that train whole beside the adapters: norms, `embed_tokens`, `lm_head`, by name, path or "
        "wildcard.",
    )
    bias: Annotated[Literal["none"], BeforeValidator(_no_biases)] = Field(
        default="none", description="peft's key, at its default only: biases stay frozen."
    )
    dim: PositiveInt = Field(default=8, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(default=32, description="The update is scaled by alpha / dim.")
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(dim) instead (rsLoRA).")
    init_lora_weights: InitLoraWeights | None = Field(
        default=None,
        description="`pissa`: A and B start as the largest singular values of the weights, the base keeps the rest "
        "(PiSSA); `pissa_niter_N`: found by N subspace iterations, much faster; null: A's init method, B zero.",
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="Other ranks by linear, named in the forms of `target_modules` or as peft does, by a regular "
        "expression for a name's end; the first that fits counts.",
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="Other alphas by linear, likewise; divided by the linear's own rank.",
    )
    lora_plus_ratio: float | None = Field(
        default=None, ge=1.0, description="Learning rate of B over that of A (LoRA+); null: the same."
    )
    dora_cached_norms: bool = Field(
        default=True,
        description="`dora`: compute the norms once an optimizer step and keep them; false: in every forward pass.",
    )
    dropout: Fraction = Field(default=0.0, description="Probability of dropout in the adapter's branch.")
    dropout_position: DropoutPosition = Field(
        default="post", description="Dropout on the adapter's input (`pre`) or on its output (`post`)."
    )
    init_adapter: Place | None = Field(default=None, description="HF PEFT adapter folder to start from.")
    quantization: Literal["nf4"] | None = Field(
        default=None,
        description="Hold the frozen linears in 4 bits (QLoRA; with `dora`: QDoRA); null: as the base's folder has "
        "them. Needs `lora_dtype`.",
    )
    double_quantization: bool = Field(default=False, description="With `quantization`: the blocks' scales in 8 bits.")
    lora_dtype: Annotated[str | None, BeforeValidator(_dtype_name)] = Field(
        default=None,
        description="The adapters' own dtype (`float32`, `bfloat16`, `float16`); null: `policy.precision` (Megatron), "
        "`float32` (DTensor, which has no other). Required over a base in 4 bits.",
    )

    @model_validator(mode="after")
    def _targets_or_exclusions(self) -> Self:
        if self.target_modules and self.exclude_modules:
            raise ValueError(
                f"exclude_modules={self.exclude_modules} needs empty target_modules, which has {self.target_modules}; "
                "keep one of the two"
            )
        return self

    @model_validator(mode="after")
    def _quantized_base_stays_frozen(self) -> Self:
        if self.double_quantization and self.quantization is None:
            raise ValueError("double_quantization=true needs quantization=nf4, whose scales it is about; set both")
        if self.quantization is None:
            return self
        if not self.enabled:
            raise ValueError(
                f"quantization={self.quantization} with enabled=false: full fine-tuning trains the linears, and 4-bit "
                "weights take no gradient steps; set enabled=true to train adapters over them, or quantization=null"
            )
        if self.lora_dtype is None:
            raise ValueError(
                f"quantization={self.quantization} needs lora_dtype: the adapters' dtype follows the base weights', "
                "and those have none in 4 bits; set lora_dtype=bfloat16 or float32 (DTensor backend: float32)"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.init_lora_weights is not None and self.init_adapter is not None:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights} draws what the adapter starts with, and "
                f"init_adapter={self.init_adapter} gives it; keep one of the two"
            )
        if self.init_lora_weights is not None and self.quantization is not None:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights} changes the base's weights, and quantization="
                f"{self.quantization} holds them in 4 bits, where the change would be lost; keep one of the two"
            )
        return self


class PeftConfig(_Adapter):
    """`policy.megatron_cfg.peft`: adapters of the Megatron backend."""

    lora_A_init_method: InitMethod = Field(default="xavier", description="Initial values of A.")
    lora_B_init_method: InitMethod = Field(default="zero", description="Initial values of B.")
    a2a_experimental: bool = Field(
        default=False,
        description="Row-parallel linears under sequence parallelism: split B over TP and exchange by all-to-all.",
    )
    share_expert_adapters: bool = Field(
        default=False, description="One adapter for all experts of a layer, at every EP and ETP; false: one for each."
    )
    normalize_moe_lora: bool = Field(
        default=False, description="The rank of adapters on experts is `dim` divided by the experts of a token."
    )

    @model_validator(mode="after")
    def _whole_b_for_norms(self) -> Self:
        if self.a2a_experimental and self.type == "dora":
            raise ValueError(
                "a2a_experimental=true splits B over TP; type='dora' needs a row-parallel linear's whole B for "
                "its norms; set a2a_experimental=false"
            )
        return self


class LoraConfig(_Adapter):
    """`policy.dtensor_cfg.lora_cfg`: adapters of the DTensor backend."""

    match_all_linear: bool = Field(default=True, description="Adapt every linear, whatever `target_modules` says.")
    lora_A_init: InitMethod = Field(default="xavier", description="Initial values of A; B starts at zero.")
    use_triton: bool = Field(
        default=True, description="Fused kernel on a GPU; only without tensor parallelism (`tensor_parallel_size` 1)."
    )

    @model_validator(mode="after")
    def _factors_in_float32(self) -> Self:
        if self.lora_dtype not in (None, "float32"):
            raise ValueError(
                f"lora_dtype={self.lora_dtype}: the DTensor backend trains adapters in float32 and casts them for the "
                "products; set lora_dtype=float32"
            )
        return self
