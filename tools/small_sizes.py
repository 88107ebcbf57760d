"""Sizes of small models with recurrent layers, under the names of transformers' configs."""

from typing import Any

# Value heads beyond key heads, layers of both kinds on each of two pipeline stages.
LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
# Two groups of heads; beside them the shared experts of a hybrid.
MAMBA: dict[str, Any] = {
    "head_dim": 32,
    "ssm_state_size": 6,
    "mamba_num_heads": 8,
    "mamba_head_dim": 10,
    "n_groups": 2,
    "conv_kernel": 3,
    "moe_shared_expert_intermediate_size": 56,
}
