"""From a global batch to this rank's micro-batches; the same for both backends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.packing import collate, plan_micro_batches, round_up
from megatron_lora.data.shared_prefix import Family, collate_families, find_families, single

Groups = Sequence[Sequence[Row]]
Purpose = Literal["training", "scoring", "evaluation"]

# A pass without gradients keeps one layer's activations, not all layers', so it takes more tokens at once than training
# does: up to this many times, and no more than saturate a GPU.
TOKENS_WITHOUT_GRADIENTS, MOST_TOKENS_WITHOUT_GRADIENTS = 4, 16384


@dataclass(frozen=True)
class BatchingOptions:
    """How a layout wants its micro-batches. row_multiple, total_multiple: tokens that a row, a micro-batch is padded
    to a multiple of. micro_batch_multiple: of how many micro-batches a rank's number must be a multiple. equal_totals:
    pad all micro-batches to the same total (stages that exchange both ways with one peer mix up unlike shapes).
    bounded_logits: whole logits never exist. num_stages: of the pipeline, which few large micro-batches leave idle.
    shares_prefixes: rows that begin alike send what they share through the model once."""

    pad_token_id: int
    row_multiple: int = 1
    total_multiple: int = 1
    micro_batch_multiple: int = 1
    equal_totals: bool = False
    bounded_logits: bool = True
    num_stages: int = 1
    shares_prefixes: bool = False


@dataclass(frozen=True)
class Share:
    """This rank's part of a global batch. groups: positions of the groups in each micro-batch; plan: the same of every
    data-parallel rank. num_tokens: that go through the model on all of them, without padding."""

    batches: list[MicroBatch]
    groups: list[list[int]]
    plan: list[list[list[int]]]
    num_tokens: int


@dataclass(frozen=True)
class _Limits:
    """What one micro-batch may hold: exactly one of the two is set."""

    max_groups: int | None = None
    max_tokens: int | None = None


def divide(
    groups: Groups,
    policy: PolicyConfig,
    options: BatchingOptions,
    *,
    dp_size: int,
    dp_rank: int,
    purpose: Purpose,
) -> Share:
    """Cut the global batch into micro-batches, as packing, dynamic batching or a fixed number of rows say. Every rank
    computes the same plan and takes its part."""
    limits = _limits(policy, options, purpose)
    if options.shares_prefixes:
        least = dp_size * options.micro_batch_multiple
        families = find_families(groups, max_tokens=limits.max_tokens, max_groups=limits.max_groups, min_families=least)
    else:
        families = [single(number, rows, options.row_multiple) for number, rows in enumerate(groups)]
    family_plan = plan_micro_batches(
        [family.num_tokens for family in families],
        dp_size=dp_size,
        max_groups=limits.max_groups,
        max_tokens=limits.max_tokens,
        micro_batch_multiple=options.micro_batch_multiple,
        dynamic=policy.dynamic_batching.enabled and limits.max_tokens is not None,
        algorithm=policy.sequence_packing.algorithm,
        group_counts=[len(family.groups) for family in families],
    )
    mine = [[families[number] for number in members] for members in family_plan[dp_rank]]
    plan = [[[p for n in members for p in families[n].groups] for members in rank] for rank in family_plan]
    all_families = [[families[number] for number in members] for rank in family_plan for members in rank]
    fixed_total = _largest_total(all_families, options) if options.equal_totals else None
    return Share(
        batches=[_collate(members, groups, options, fixed_total) for members in mine],
        groups=plan[dp_rank],
        plan=plan,
        num_tokens=sum(family.num_tokens for family in families),
    )


def _limits(policy: PolicyConfig, options: BatchingOptions, purpose: Purpose) -> _Limits:
    """A recipe's explicit numbers are obeyed; where it has none, a pass without gradients takes as many tokens as
    training does, or more where its memory is bounded (whole logits are not, and a pipeline wants many micro-batches).
    """
    packing, dynamic = policy.sequence_packing, policy.dynamic_batching
    by_tokens = packing.enabled or dynamic.enabled
    section = dynamic if dynamic.enabled else packing
    if purpose == "training":
        if by_tokens:
            return _Limits(max_tokens=section.train_mb_tokens)
        return _Limits(max_groups=policy.train_micro_batch_size)
    if purpose == "scoring" and by_tokens and section.logprob_mb_tokens is not None:
        return _Limits(max_tokens=section.logprob_mb_tokens)
    if purpose == "scoring" and not by_tokens and policy.logprob_batch_size is not None:
        return _Limits(max_groups=policy.logprob_batch_size)
    in_training = section.train_mb_tokens if by_tokens else None
    tokens = in_training or policy.max_total_sequence_length * policy.train_micro_batch_size
    if options.bounded_logits and options.num_stages == 1:
        tokens = max(tokens, min(TOKENS_WITHOUT_GRADIENTS * tokens, MOST_TOKENS_WITHOUT_GRADIENTS))
    return _Limits(max_tokens=tokens)


def _collate(
    families: Sequence[Family], groups: Groups, options: BatchingOptions, fixed_total: int | None
) -> MicroBatch:
    if any(family.prefix for family in families):
        return collate_families(
            [(family.prefix, _rows([family], groups)) for family in families],
            pad_token_id=options.pad_token_id,
            total_multiple=options.total_multiple,
            fixed_total=fixed_total,
        )
    return collate(
        _rows(families, groups),
        pad_token_id=options.pad_token_id,
        row_multiple=options.row_multiple,
        total_multiple=options.total_multiple,
        fixed_total=fixed_total,
        like=groups[0][0],
    )


def _rows(families: Sequence[Family], groups: Groups) -> list[Row]:
    return [row for family in families for position in family.groups for row in groups[position]]


def _largest_total(micro_batches: Sequence[Sequence[Family]], options: BatchingOptions) -> int:
    longest = max(sum(family.num_tokens for family in families) for families in micro_batches)
    return round_up(max(longest, 1), math.lcm(options.row_multiple, options.total_multiple))
