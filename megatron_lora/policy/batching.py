"""From a global batch to this rank's micro-batches; the same for both backends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.packing import collate, padded_group_lengths, plan_micro_batches, round_up

Groups = Sequence[Sequence[Row]]


@dataclass(frozen=True)
class BatchingOptions:
    """How a layout wants its micro-batches. row_multiple, total_multiple: tokens that a row, a micro-batch is padded
    to a multiple of. micro_batch_multiple: of how many micro-batches a rank's number must be a multiple. equal_totals:
    pad a rank's micro-batches to the same total (stages that exchange both ways with one peer mix up unlike shapes)."""

    pad_token_id: int
    row_multiple: int = 1
    total_multiple: int = 1
    micro_batch_multiple: int = 1
    equal_totals: bool = False


@dataclass(frozen=True)
class Share:
    """This rank's part of a global batch. groups: positions of the groups in each micro-batch."""

    batches: list[MicroBatch]
    groups: list[list[int]]


def divide(
    groups: Groups,
    policy: PolicyConfig,
    options: BatchingOptions,
    *,
    dp_size: int,
    dp_rank: int,
    training: bool,
) -> Share:
    """Cut the global batch into micro-batches, as packing, dynamic batching or a fixed number of rows say. Every rank
    computes the same plan and takes its part."""
    packing, dynamic = policy.sequence_packing, policy.dynamic_batching
    max_tokens = max_groups = None
    if packing.enabled or dynamic.enabled:
        section = packing if packing.enabled else dynamic
        max_tokens = section.train_mb_tokens if training else section.logprob_mb_tokens
    else:
        max_groups = policy.train_micro_batch_size if training else policy.logprob_batch_size
    plan = plan_micro_batches(
        padded_group_lengths(groups, options.row_multiple),
        dp_size=dp_size,
        max_groups=max_groups,
        max_tokens=max_tokens,
        micro_batch_multiple=options.micro_batch_multiple,
        dynamic=dynamic.enabled,
        algorithm=packing.algorithm,
    )
    mine = plan[dp_rank]
    rows = [[row for position in members for row in groups[position]] for members in mine]
    fixed_total = _largest_total(rows, options) if options.equal_totals else None
    batches = [
        collate(
            members,
            pad_token_id=options.pad_token_id,
            row_multiple=options.row_multiple,
            total_multiple=options.total_multiple,
            fixed_total=fixed_total,
            like=groups[0][0],
        )
        for members in rows
    ]
    return Share(batches=batches, groups=mine)


def _largest_total(micro_batches: Sequence[Sequence[Row]], options: BatchingOptions) -> int:
    longest = max(sum(padded_group_lengths([rows], options.row_multiple)) for rows in micro_batches)
    return round_up(max(longest, 1), math.lcm(options.row_multiple, options.total_multiple))
