"""The adapter a run starts with: drawn from a seed, or read from an HF PEFT folder."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.config.schema_adapters import LoraConfig, PeftConfig
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.conversion.export import read_peft_folder
from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.conversion.saved_modules import check_saved, select_saved
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.init import Factors, given_factors, initial_factors
from megatron_lora.lora.layout import FACTORS, AdapterSpec, ModelSpec, ModuleLayout, segments_of
from megatron_lora.lora.merge import merge_targets
from megatron_lora.lora.methods import ReadWeight, method_of
from megatron_lora.lora.packed_experts import is_on_experts
from megatron_lora.lora.peft_reading import from_hf
from megatron_lora.lora.principal import check_ranks, principal_start, residual_reader
from megatron_lora.lora.targets import Naming, Selection, build_modules, match_patterns, select_linears
from megatron_lora.policy.expert_adapters import check_expert_adapters, check_with_recipe, expert_ranks, misread_by_peft
from megatron_lora.policy.weights_check import local_fingerprint, read_base


@dataclass(frozen=True)
class StartingAdapter:
    """spec: what is adapted. tensors: the whole factors, fused, or None where they are to be drawn. notices: how the
    recipe was understood, for the user. init: peft's name of a start from the base's singular values, or None."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor] | None
    notices: list[str] = field(default_factory=list)
    init: str | None = None


@dataclass(frozen=True)
class DrawnStart:
    """What the modules of a run start with. factors: a module's whole factors. principal: of these A and B, where the
    base keeps what they leave of it; else None. saved: what a folder gives for the modules that train whole; the base's
    otherwise."""

    spec: AdapterSpec
    factors: Factors
    principal: Factors | None = None
    saved: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def changed_base(self) -> Callable[[ReadWeight], ReadWeight] | None:
        """From how the base is read to how the model's weights are; None where they are the base's."""
        principal = self.principal
        return None if principal is None else lambda read: residual_reader(read, self.spec, principal)

    def principal_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """`<module>.<factor>` -> the principal factors of the modules of these names."""
        assert self.principal is not None
        modules = [module for module in self.spec.modules if module.name in names]
        return {f"{module.name}.{key}": value for module in modules for key, value in self.principal(module).items()}


def starting_adapter(config: PeftConfig | LoraConfig, shapes: ModelSpec, model_name: str) -> StartingAdapter:
    """The recipe's adapter. Raises UserError for a pattern that fits nothing, or a folder that does not fit."""
    fingerprint = local_fingerprint(model_name)
    settings = config.model_dump(mode="json", exclude={"enabled"})
    method = method_of(config.type)
    if config.init_adapter is not None:
        folder = read_peft_folder(Path(config.init_adapter))
        share = config.share_expert_adapters if isinstance(config, PeftConfig) else None
        spec, fused = from_hf(
            *folder, shapes, base_model_name=model_name, base_fingerprint=fingerprint, share_experts=share
        )
        if spec.type != method.type:
            raise UserError(
                f"{config.init_adapter} holds an adapter of type {spec.type!r}, and {_section(config)}.type="
                f"{config.type!r}; set it to {spec.type!r}"
            )
        spec.settings = settings
        check_expert_adapters(config, spec, _section(config))
        adapted = list(merge_targets(spec))
        check_saved(shapes, spec.saved, adapted, f"{config.init_adapter}, modules_to_save")
        # The folder's own names mean what peft means by them: `norm` is every module whose name ends so.
        found = list(folder[0].get("modules_to_save") or [])
        key = f"{_section(config)}.modules_to_save"
        if set(config.modules_to_save) != set(found) and (
            select_saved(shapes, config.modules_to_save, adapted, key) != spec.saved
        ):
            raise UserError(
                f"{config.init_adapter} trains modules_to_save={found} whole, and {key}={config.modules_to_save}; set "
                f"it to {found}"
            )
        return StartingAdapter(spec, fused, [*_unused_settings(config, spec, shapes), *misread_by_peft(spec)])
    chosen = _select(config, shapes)
    modules = _modules_of_keys(config, chosen, shapes)
    adapted = [linear.name for linear in chosen.linears]
    saved = select_saved(shapes, config.modules_to_save, adapted, f"{_section(config)}.modules_to_save")
    spec = AdapterSpec(model_name, shapes, modules, fingerprint, settings, method.type, saved=saved)
    check_expert_adapters(config, spec, _section(config))
    if config.init_lora_weights is not None:
        spec.residual = True
        check_ranks(spec, f"{_section(config)}.init_lora_weights={config.init_lora_weights}")
    return StartingAdapter(spec, None, [*chosen.notices, *misread_by_peft(spec)], config.init_lora_weights)


def draw_start(
    start: StartingAdapter,
    methods: tuple[str, str],
    seed: int,
    dtype: torch.dtype,
    weights: WeightSource,
    product_dtype: torch.dtype,
) -> DrawnStart:
    """Values for what the recipe adapts, drawn from the seed, computed from the base, or those of `init_adapter`.

    methods: how A and B are drawn. dtype: of the run's factors. weights, product_dtype: as for `base_reader`.
    """
    if start.tensors is not None:
        saved = {name: start.tensors[name] for name in start.spec.saved}
        return DrawnStart(start.spec, given_factors(start.spec, start.tensors), saved=saved)
    spec = start.spec
    read = base_reader(spec, weights, product_dtype)
    if start.init is None:
        return DrawnStart(spec, initial_factors(spec, *methods, seed, read))
    assert read is not None and not isinstance(weights, FourBitFolder | QuantizedWeights)  # `check_quantization`
    principal = principal_start(spec, start.init, seed, read, dtype)
    rest = residual_reader(read, spec, principal)
    return DrawnStart(spec, initial_factors(spec, *methods, seed, rest, principal), principal)


def _modules_of_keys(config: PeftConfig | LoraConfig, chosen: Selection, shapes: ModelSpec) -> list[ModuleLayout]:
    """What the recipe's keys describe, on the linears that were chosen."""
    naming = _naming(config)
    shared = isinstance(config, PeftConfig) and config.share_expert_adapters
    values = {
        name: match_patterns(
            shapes, chosen.linears, getattr(config, name), key=f"{_section(config)}.{name}", naming=naming
        )
        for name in ("rank_pattern", "alpha_pattern")
    }
    return build_modules(
        chosen.linears,
        config.dim,
        config.alpha,
        shapes,
        ranks=expert_ranks(config, chosen.linears, shapes) | values["rank_pattern"],
        alphas=values["alpha_pattern"],
        use_rslora=config.use_rslora,
        separate=method_of(config.type).separate,
        share_experts=shared,
    )


def base_reader(spec: AdapterSpec, weights: WeightSource, dtype: torch.dtype) -> ReadWeight | None:
    """Reads the base's weights by HF name, as the run computes with them, for an adapter whose start or reference needs
    them; None for others. dtype: of products with weights in 4 bits."""
    if not (method_of(spec.type).reads_base or spec.residual or spec.saved):
        return None

    def read(name: str) -> Tensor:
        matrix = weights.read_four_bit(name) if isinstance(weights, FourBitFolder | QuantizedWeights) else None
        return weights.read(name) if matrix is None else matrix.dense(dtype)

    return read


def _section(config: PeftConfig | LoraConfig) -> str:
    return "policy.megatron_cfg.peft" if isinstance(config, PeftConfig) else "policy.dtensor_cfg.lora_cfg"


def _naming(config: PeftConfig | LoraConfig) -> Naming:
    return "megatron" if isinstance(config, PeftConfig) else "hf"


def _unused_settings(config: PeftConfig | LoraConfig, spec: AdapterSpec, shapes: ModelSpec) -> list[str]:
    """A notice where the folder of `init_adapter` is another adapter than the recipe's keys describe."""
    wanted = _linears(_modules_of_keys(config, _select(config, shapes), shapes))
    found = _linears(spec.modules)
    if {name: (rank, scale) for name, (rank, _, scale) in wanted.items()} == {
        name: (rank, scale) for name, (rank, _, scale) in found.items()
    }:
        return []
    return [
        f"init_adapter={config.init_adapter} decides what is adapted: {_describe_linears(found)}; the recipe's "
        f"target_modules, exclude_modules, dim and alpha ({_describe_linears(wanted)}) are not used"
    ]


def _linears(modules: Sequence[ModuleLayout]) -> dict[str, tuple[int, float, float]]:
    """Each linear as Hugging Face cuts them: (rank, alpha, scale), however they are fused."""
    return {
        f"{module.name}.{segment}": (block.rank, block.alpha, block.scale)
        for module in modules
        for block in module.blocks
        for segment in block.segments
    }


def _describe_linears(linears: Mapping[str, tuple[int, float, float]]) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    ranks, alphas = (sorted({value[number] for value in linears.values()}) for number in (0, 1))
    sizes = [
        f"{name} {'/'.join(f'{value:g}' for value in values)}" for name, values in (("rank", ranks), ("alpha", alphas))
    ]
    return f"{len(linears)} linears ({', '.join(kinds)}), {', '.join(sizes)}"


def _select(config: PeftConfig | LoraConfig, shapes: ModelSpec) -> Selection:
    targets, exclusions = config.target_modules, config.exclude_modules
    key, naming = _section(config), _naming(config)
    if isinstance(config, PeftConfig) or not (config.match_all_linear and targets):
        return select_linears(shapes, targets, exclusions, key=key, naming=naming)
    chosen = select_linears(shapes, [], exclusions, key=key, naming=naming)
    return Selection(chosen.linears, [f"{key}.match_all_linear=true: target_modules={targets} is not used"])


def planned_adapter(policy: PolicyConfig) -> StartingAdapter | None:
    """The adapter that the recipe's backend will train, from the model's config alone; None for full fine-tuning.
    Raises UserError as `starting_adapter` does."""
    if not policy.adapter.enabled:
        return None
    planned = starting_adapter(policy.adapter, read_base(policy).shapes, policy.model_name)
    check_with_recipe(policy, planned.spec)
    return planned


def check_same_adapter(wanted: AdapterSpec, found: AdapterSpec, folder: Path) -> None:
    """Raise UserError where a checkpoint's adapter (`found`, in `folder`) is not of this run's shapes."""
    if wanted.shapes != found.shapes:
        differing = wanted.shapes.differences(found.shapes, "here ")
        raise UserError(
            f"{folder} was trained on another model ({found.base_model_name}), with {', '.join(differing)}; set "
            "policy.model_name to that model or choose another checkpointing.checkpoint_dir"
        )
    if wanted.residual != found.residual:
        theirs, ours = ("pissa", "null") if found.residual else ("null", "pissa")
        raise UserError(
            f"{folder} holds an adapter of a run with init_lora_weights {theirs}, and this run's is {ours}: they are "
            "of different bases; restore the recipe's key or choose another checkpointing.checkpoint_dir"
        )
    if wanted.saved != found.saved:
        theirs, ours = ([name.removesuffix(".weight") for name in spec.saved] for spec in (found, wanted))
        raise UserError(
            f"{folder} has modules_to_save={theirs}, and this run trains {ours} whole; restore the recipe's "
            "modules_to_save or choose another checkpointing.checkpoint_dir"
        )
    if wanted.type != found.type:
        raise UserError(
            f"{folder} holds an adapter of type {found.type!r}, and this run's is of type {wanted.type!r}; "
            "restore the recipe's type or choose another checkpointing.checkpoint_dir"
        )
    if _base_form(wanted) != _base_form(found):
        raise UserError(
            f"{folder} was trained over a base in another form (quantization, double_quantization: "
            f"{_base_form(found)}) than this run's ({_base_form(wanted)}); restore the recipe's keys or choose another "
            "checkpointing.checkpoint_dir"
        )
    if [(m.name, m.blocks) for m in wanted.modules] != [(m.name, m.blocks) for m in found.modules]:
        raise UserError(
            f"{folder} holds other adapters ({_summary(found)}) than this run's ({_summary(wanted)}); "
            "restore the recipe's peft section or choose another checkpointing.checkpoint_dir"
        )


def _base_form(spec: AdapterSpec) -> tuple[str | None, bool]:
    """Adapters of older releases are over a base as its folder has it."""
    return spec.settings.get("quantization"), bool(spec.settings.get("double_quantization"))


def _summary(spec: AdapterSpec) -> str:
    names = sorted({module.kind for module in spec.modules})
    ranks = sorted({module.rank for module in spec.modules})
    alphas = sorted({block.alpha for module in spec.modules for block in module.blocks})
    parts = (("rank", ranks), ("alpha", alphas))
    sizes = ", ".join(f"{name} {'/'.join(f'{value:g}' for value in values)}" for name, values in parts)
    return f"{len(spec.modules)} linears of {', '.join(names)}, {sizes}"


def describe_modules(spec: AdapterSpec) -> list[tuple[str, ...]]:
    """Linears of the same kind and shape in one row: (linear, layers, rank, alpha, A, B, parameters)."""
    rows: dict[tuple[str, ...], list[ModuleLayout]] = {}
    shapes = spec.factor_shapes()
    for module in spec.modules:
        a, b = (shapes[f"{module.name}.{FACTORS[key].name}"] for key in ("A", "B"))
        alphas = sorted({block.alpha for block in module.blocks})
        alpha = ", ".join(f"{value:g}" for value in alphas)
        label = _linear_label(module, spec.shapes)
        key = (label, str(module.rank), alpha, f"{a[0]} x {a[1]}", f"{b[0]} x {b[1]}")
        rows.setdefault(key, []).append(module)
    return [
        (
            label,
            _ranges([module.layer for module in modules]),
            *sizes,
            f"{sum(map(spec.num_parameters, modules)):,}",
        )
        for (label, *sizes), modules in rows.items()
    ] + _describe_saved(spec)


def _describe_saved(spec: AdapterSpec) -> list[tuple[str, ...]]:
    """Modules that train whole, those of one name in one row."""
    counts: dict[str, list[int]] = {}
    for name, shape in spec.saved.items():
        counts.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(math.prod(shape))
    return [
        (f"{leaf} (whole)", f"{len(sizes)} in all", "-", "-", "-", "-", f"{sum(sizes):,}")
        for leaf, sizes in counts.items()
    ]


def _linear_label(module: ModuleLayout, shapes: ModelSpec) -> str:
    """The fused linear, and where only some of the linears that it covers are adapted, which."""
    served = {segment for block in module.blocks for segment in block.segments}
    order = segments_of(module.kind, shapes)
    if is_on_experts(module, shapes):
        number = shapes.linear(module.kind).experts
        return f"{module.kind} ({f'one for {number}' if module.expert is None else f'each of {number}'})"
    return module.kind if served == set(order) else f"{module.kind} ({', '.join(s for s in order if s in served)})"


def _ranges(layers: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] as `0-2, 5`."""
    numbers = sorted({layer for layer in layers if layer is not None})
    if not numbers:
        return "-"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
