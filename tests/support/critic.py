"""PPO's critic in plain torch on transformers and peft: one base with two adapters, a policy's and a critic's, each
with AdamW of its own; what both backends are measured against."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from megatron_lora.data.batch import Row
from tests.support.reference import SHARED_A, stored_name, sum_of_target_logps

CLIP = 0.2
# Values begin near 0, and so do the gradients of the factors below them: an update is to follow from their size.
ADAM_EPS = 1e-5
# `critic` of a recipe.
CRITIC: dict[str, Any] = {
    "optim": {"lr": 5e-3, "weight_decay": 0.05},
    "max_grad_norm": 0.5,
    "cliprange_value": CLIP,
}


@dataclass
class Both:
    """Losses and gradient norms of the policy and of the critic, and what the critic trained, under PEFT names."""

    losses: list[float]
    grad_norms: list[float]
    value_losses: list[float]
    value_norms: list[float]
    critic: dict[str, Tensor]


def with_values(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with old values around what a new critic gives, and returns, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(row: Row, size: float) -> Tensor:
        return torch.randn(len(row), generator=generator) * size

    return [replace(row, token_fields={"values": drawn(row, 0.3), "returns": drawn(row, 1.0)}) for row in rows]


def train_both(base: Path, adapter: Path, steps: Sequence[Sequence[Row]], lr: float, seed: int) -> Both:
    """A step of the policy on the rows' log-probabilities, then one of the critic on their returns, in turn. seed: of
    the value head."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.load_adapter(adapter, "critic", is_trainable=True)
    _tie(model, ("default", "critic"))
    hidden_size = model.config.hidden_size
    head = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(seed)) / (hidden_size + 1)
    head = torch.nn.Parameter(head)
    sets = {name: [p for key, p in model.named_parameters() if f".{name}." in key] for name in ("default", "critic")}
    policy = _optimizer(sets["default"], lr, 0.1)
    critic = _optimizer([*sets["critic"], head], CRITIC["optim"]["lr"], CRITIC["optim"]["weight_decay"])
    found = Both([], [], [], [], {})
    for rows in steps:
        count = sum(row.num_targets for row in rows)
        model.set_adapter("default")
        loss = -sum_of_target_logps(model, list(rows)) / count
        found.losses.append(loss.item())
        found.grad_norms.append(_update(policy, loss, 1.0))
        model.set_adapter("critic")
        loss = _value_loss(model, head, rows) / count
        found.value_losses.append(loss.item())
        found.value_norms.append(_update(critic, loss, CRITIC["max_grad_norm"]))
    factors = {
        stored_name(name.replace(".critic.", ".default.")): value.detach().clone()
        for name, value in model.named_parameters(remove_duplicate=False)
        if ".critic." in name
    }
    found.critic = factors | {"base_model.model.score.weight": head.detach()}
    return found


def _optimizer(parameters: Sequence[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98), eps=ADAM_EPS)


def _tie(model: torch.nn.Module, adapters: Sequence[str]) -> None:
    for module in model.modules():
        for names in SHARED_A:
            present = [getattr(module, name) for name in names if hasattr(getattr(module, name, None), "lora_A")]
            for linear in present[1:]:
                for adapter in adapters:
                    linear.lora_A[adapter].weight = present[0].lora_A[adapter].weight


def _value_loss(model: Any, head: Tensor, rows: Sequence[Row]) -> Tensor:
    """The sum over all target tokens; a token's value is of the state in front of it."""
    ids, mask, old, returns = (
        pad_sequence(list(values), batch_first=True)
        for values in (
            [row.input_ids for row in rows],
            [row.target_mask for row in rows],
            [row.token_fields["values"] for row in rows],
            [row.token_fields["returns"] for row in rows],
        )
    )
    hidden = model.base_model.model.model(ids).last_hidden_state[:, :-1]
    values = (hidden @ head.t()).squeeze(-1)
    mask, old, returns = mask[:, 1:], old[:, 1:], returns[:, 1:]
    clipped = old + (values - old).clamp(-CLIP, CLIP)
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float) -> float:
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return float(norm)
