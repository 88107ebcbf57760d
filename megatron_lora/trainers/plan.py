"""What a run will do, told by --dry-run before any weight is loaded."""

import math
from collections.abc import Sequence

from megatron_lora.config.schema import PolicyConfig, Recipe
from megatron_lora.data.loader import GroupLoader
from megatron_lora.lora.four_bit import BLOCK_SIZE, GROUP_SIZE
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.model_spec import LinearSpec, ModelSpec
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.critic import critic_spec
from megatron_lora.policy.weights_check import read_base
from megatron_lora.trainers.algorithms import algorithm_of
from megatron_lora.trainers.setup import count_steps, count_updates

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_BYTES = 16  # a trained parameter: fp32 gradient, master weight and Adam's two moments


def describe_plan(recipe: Recipe, loader: GroupLoader, num_ranks: int) -> list[str]:
    """Lines on layout, parameters, steps and memory. Raises UserError where the adapter's patterns fit nothing."""
    lines = [_layout(recipe, num_ranks)]
    planned = planned_adapter(recipe.policy)
    if planned is None:
        lines += _full(recipe, count_parameters(read_base(recipe.policy).shapes), num_ranks)
    else:
        spec = planned.spec
        trainable = spec.num_trainable
        base = count_parameters(spec.shapes)
        kinds = ", ".join(dict.fromkeys(module.kind for module in spec.modules))
        lines.append(
            f"trainable: {trainable:,} parameters in {len(spec.modules)} linears ({kinds})"
            f"{f' and {len(spec.saved)} modules that train whole' if spec.saved else ''}; the base has about {base:,}"
        )
        adapters = [spec]
        if recipe.critic is not None:
            adapters.append(critic_spec(spec))
            more = adapters[-1].num_trainable
            lines.append(f"critic: {more:,} parameters more, adapters and a value head on the same base")
        lines.append(_memory(recipe, adapters, num_ranks))
    return [*lines, _steps(recipe, loader)]


def _layout(recipe: Recipe, num_ranks: int) -> str:
    policy = recipe.policy
    if policy.backend == "megatron":
        config = policy.megatron_cfg
        sizes = {
            "TP": config.tensor_model_parallel_size,
            "PP": config.pipeline_model_parallel_size,
            "CP": config.context_parallel_size,
        }
        data_parallel = num_ranks // config.model_parallel_size
        experts = _experts_layout(policy)
    else:
        sizes = {"TP": policy.dtensor_cfg.tensor_parallel_size}
        data_parallel, experts = num_ranks // policy.dtensor_cfg.tensor_parallel_size, ""
    layout = " x ".join(f"{name} {size}" for name, size in {**sizes, "DP": data_parallel}.items())
    what = f"{recipe.algorithm} of {policy.model_name} in {policy.precision} by {policy.backend}"
    return f"{what}: ranks {num_ranks} = {layout}{experts}"


def _experts_layout(policy: PolicyConfig) -> str:
    num_experts, config = read_base(policy).shapes.num_experts, policy.megatron_cfg
    if not num_experts:
        return ""
    return (
        f"; {num_experts} experts a layer over EP {config.expert_model_parallel_size} x ETP "
        f"{config.expert_tensor_parallel_size}"
    )


def _steps(recipe: Recipe, loader: GroupLoader) -> str:
    steps = count_steps(recipe, len(loader))
    return algorithm_of(recipe).describe_steps(recipe, loader, steps, count_updates(recipe, steps))


def _full(recipe: Recipe, parameters: int, num_ranks: int) -> list[str]:
    """Of full fine-tuning, whose start is the reference where there is one."""
    policy = recipe.policy
    if policy.backend == "megatron":
        shares = policy.megatron_cfg.tensor_model_parallel_size * policy.megatron_cfg.pipeline_model_parallel_size
        copies = num_ranks // shares if policy.megatron_cfg.optimizer.use_distributed_optimizer else 1
        width = BYTES[policy.precision]
        # Weights and fp32 gradients on every rank of a data-parallel group, masters and moments divided among them.
        each = width + 4 + ((4 if width < 4 else 0) + 8) / copies
    else:
        shares, width, each = num_ranks, 4, 16.0
    lines = [
        f"full fine-tuning: every parameter trains, about {parameters:,}",
        f"memory a rank, as far as it is known: weights, gradients and optimizer "
        f"{parameters * each / shares / GIB:.2f} GiB; activations, logits and a rollout engine come on top",
    ]
    if recipe.keeps_start:
        where = "CPU memory" if policy.reference_weights == "cpu" else "the device's memory"
        lines.append(
            f"reference: the starting weights, {parameters * width / shares / GIB:.2f} GiB a rank in {where} "
            f"(policy.reference_weights={policy.reference_weights})"
        )
    return lines


def _memory(recipe: Recipe, adapters: Sequence[AdapterSpec], num_ranks: int) -> str:
    """The parts that follow from shapes alone, for one rank. adapters: all on the one base."""
    policy, shapes = recipe.policy, adapters[0].shapes
    width = BYTES[policy.precision]
    ranks, expert_ranks = num_ranks, num_ranks  # FSDP and TP together split every weight over all ranks
    if policy.backend == "megatron":
        config = policy.megatron_cfg
        ranks = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
        expert_ranks = (
            config.expert_model_parallel_size * config.expert_tensor_parallel_size * config.pipeline_model_parallel_size
        )
    experts = sum(_elements(linear, shapes) for linear in shapes.linears[:-1] if linear.experts)
    linears = sum(_elements(linear, shapes) for linear in shapes.linears[:-1] if not linear.experts)
    rest = count_parameters(shapes) - experts - linears
    linear_width = _four_bit_width(policy) or width
    weights = (linears * linear_width + rest * width) / ranks + experts * linear_width / expert_ranks
    of_experts = sum(
        spec.num_parameters(module)
        for spec in adapters
        for module in spec.modules
        if shapes.linear(module.kind).experts
    )
    of_others = sum(spec.num_trainable for spec in adapters) - of_experts
    factors = of_others / ranks + of_experts / expert_ranks
    return (
        f"memory a rank, as far as it is known: base {weights / GIB:.2f} GiB, adapters with gradients and optimizer "
        f"{factors * (width + OPTIMIZER_BYTES) / GIB:.2f} GiB; activations, logits and a rollout engine come on top"
    )


def _four_bit_width(policy: PolicyConfig) -> float | None:
    """Bytes of a weight whose linears are held in 4 bits, with its share of the scales."""
    if policy.adapter.quantization is None and not read_base(policy).stored_four_bit:
        return None
    scale = 1 + 4 / GROUP_SIZE if policy.adapter.double_quantization else 4
    return 0.5 + scale / BLOCK_SIZE


def _elements(linear: LinearSpec, shapes: ModelSpec) -> int:
    """Of all layers and experts."""
    return linear.in_features * linear.out_features * shapes.num_copies(linear.layers) * max(1, linear.experts)


def count_parameters(shapes: ModelSpec) -> int:
    """Parameters of the base's linears, norms and embeddings, without biases."""
    linears = sum(_elements(linear, shapes) for linear in shapes.linears[:-1])
    rest = sum(math.prod(other.shape) * shapes.num_copies(other.layers) for other in shapes.layer_others)
    embeddings = shapes.vocab_size * shapes.hidden_size * (1 if shapes.tied_embeddings else 2)
    return linears + rest + embeddings + shapes.hidden_size
