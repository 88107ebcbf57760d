"""Which ways of choosing experts both backends compute as transformers does."""

from collections.abc import Iterator

from megatron_lora.conversion.hf_model import HFModel

# Experts by whose sum transformers ranks a group (DeepseekV3MoE.route_tokens_to_experts).
RANKED_BY = 2


def check_routing(model: HFModel, *, megatron: bool) -> Iterator[str]:
    """A problem each, as `config_gate` lists them. The model has experts. megatron: whether Megatron-Core computes."""
    routing, experts, chosen = model.routing, model.shapes.num_experts, model.shapes.num_experts_per_token
    method = getattr(model.config, "topk_method", "greedy")
    if method != "greedy":
        yield f"topk_method={method!r}: transformers' own model does not run with it; only 'greedy' is supported"
    if megatron and routing.score == "sigmoid" and not routing.normalized and chosen > 1:
        yield "norm_topk_prob=false: Megatron-Core's router divides the sigmoids of a token's experts by their sum"
    if routing.groups < 1 or experts % routing.groups or experts // routing.groups < RANKED_BY:
        yield f"n_group={routing.groups} does not divide the {experts} experts into groups of {RANKED_BY} or more"
        return
    if not 1 <= routing.chosen_groups <= routing.groups:
        yield f"topk_group={routing.chosen_groups} of n_group={routing.groups}"
        return
    size = experts // routing.groups
    if routing.chosen_groups * size < chosen:
        yield f"num_experts_per_tok={chosen} of {routing.chosen_groups} groups of {size} experts"
    if megatron and routing.groups > routing.chosen_groups and chosen // routing.chosen_groups != RANKED_BY:
        yield (
            f"num_experts_per_tok={chosen} with topk_group={routing.chosen_groups}: transformers ranks a group of "
            f"experts by its best {RANKED_BY}, Megatron-Core by its best num_experts_per_tok / topk_group"
        )
