"""Rows and micro-batches for the objectives' tests, packed here by hand so that these tests need no data room."""

import torch
from torch import Tensor

from megatron_lora.data.batch import MicroBatch, Row


def make_row(length: int, num_targets: int, index: int = 0, **fields: Tensor | float) -> Row:
    """A row whose last `num_targets` tokens are targets. Tensor fields hold one value a *target*; floats go to
    row_fields."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[length - num_targets :] = num_targets > 0
    token_fields, row_fields = {}, {}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            full = torch.full((length,), 7.0, dtype=value.dtype)  # garbage where no target is
            full[mask] = value
            token_fields[name] = full
        else:
            row_fields[name] = float(value)
    return Row(torch.arange(length), mask, index, token_fields, row_fields)


def pack(rows: list[Row], padding: int = 0) -> MicroBatch:
    """The rows one after the other, everything shifted by one; `padding` tokens follow as a dummy row."""
    if padding:
        fields = {name: torch.zeros(padding) for name in rows[0].token_fields}
        dummy = Row(torch.zeros(padding, dtype=torch.int64), torch.zeros(padding, dtype=torch.bool), -1, fields)
        dummy.row_fields = dict.fromkeys(rows[0].row_fields, 0.0)
        rows = [*rows, dummy]
    lengths = torch.tensor([len(row) for row in rows])

    def shift(values: list[Tensor]) -> Tensor:
        return torch.cat([torch.cat([v[1:], torch.zeros_like(v[:1])]) for v in values])

    return MicroBatch(
        tokens=torch.cat([row.input_ids for row in rows]),
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        targets=shift([row.input_ids for row in rows]),
        target_mask=shift([row.target_mask for row in rows]),
        row_of_token=torch.repeat_interleave(torch.arange(len(rows)), lengths),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]),
        max_seqlen=int(lengths.max()),
        row_indices=[row.index for row in rows],
        token_fields={n: shift([row.token_fields[n] for row in rows]) for n in rows[0].token_fields},
        row_fields={n: torch.tensor([row.row_fields[n] for row in rows]) for n in rows[0].row_fields},
    )


def policy_logps(rows: list[Row], batch: MicroBatch, name: str = "policy") -> Tensor:
    """The batch's token field `name` as the policy's log-probabilities: a leaf with gradient, garbage off target."""
    return batch.token_fields[name].detach().clone().requires_grad_()


def mean_loss_and_grads(objective, micro_batches: list[list[Row]], padding: int = 0) -> tuple[float, list[Tensor]]:
    """What an engine does: sum the losses over micro-batches, divide by the count known beforehand. Returns the loss
    and d loss / d policy logps of each row's targets."""
    rows = [row for group in micro_batches for row in group]
    count = objective.count(rows)
    total, grads = 0.0, []
    for group in micro_batches:
        batch = pack(group, padding)
        logps = policy_logps(group, batch)
        result = objective(logps, batch)
        (result.loss / count).backward()
        assert logps.grad is not None
        total += float(result.loss.detach()) / count
        grads += [logps.grad[batch.row_of_token == i] for i in range(len(group))]
    return total, grads
