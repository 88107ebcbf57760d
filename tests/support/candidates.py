"""Steps on the divergence over a teacher's most likely tokens, in transformers and peft: what both backends are held
against."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_lora.data.batch import Row
from tests.support.models import SIZES
from tests.support.reference import Training, stored_name, tie_shared_factors

NUM_CANDIDATES, NUM_STEPS, FORWARD_WEIGHT = 5, 4, 0.3


def with_candidates(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with a teacher's tokens, other ones in each place, drawn from the seed, and what it gives them."""
    generator = torch.Generator().manual_seed(seed)

    def fields(size: int) -> dict[str, torch.Tensor]:
        order = torch.rand(size, SIZES["vocab_size"], generator=generator).argsort(1)[:, :NUM_CANDIDATES]
        logps = torch.randn(size, NUM_CANDIDATES, generator=generator) - 3
        return {"teacher_ids": order.float(), "teacher_candidate_logps": logps, "teacher_logps": logps[:, 0]}

    return [replace(row, token_fields=fields(len(row))) for row in rows]


def whole_logps(base: Path, adapter: Path, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Log-probabilities [S - 1, V] of each row's tokens from the second on."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return [model(row.input_ids[None]).logits[0, :-1].log_softmax(-1) for row in rows]


def train(
    base: Path, adapter: Path, steps: Sequence[Sequence[Row]], lr: float, eps: float, *, whole: bool = False
) -> Training:
    """AdamW on the mean over target tokens of both divergences, each of torch, over the teacher's tokens alone; whole:
    over the vocabulary, of which the teacher gives all others a log-probability of -100 (and the forward divergence,
    whose probabilities those are, leaves them out)."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    tie_shared_factors(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), eps=eps, weight_decay=0.1)
    found = Training([], [], {})
    for number, rows in enumerate(steps):
        loss: Any = 0
        for row in with_candidates(rows, number):
            ids = row.token_fields["teacher_ids"].long()[1:]
            ids = ids[row.target_mask[1:]]
            logits = model(row.input_ids[None]).logits[0, :-1][row.target_mask[1:]]
            policy = (logits if whole else logits.gather(1, ids)).log_softmax(-1)
            teacher = row.token_fields["teacher_candidate_logps"][1:][row.target_mask[1:]].log_softmax(-1)
            of_candidates = policy.gather(1, ids) if whole else policy
            forward = F.kl_div(of_candidates, teacher, reduction="sum", log_target=True)
            if whole:
                teacher = torch.full_like(policy, -100.0).scatter(1, ids, teacher)
            reverse = F.kl_div(teacher, policy, reduction="sum", log_target=True)
            loss = loss + FORWARD_WEIGHT * forward + (1 - FORWARD_WEIGHT) * reverse
        loss = loss / sum(row.num_targets for row in rows)
        optimizer.zero_grad()
        loss.backward()
        found.losses.append(float(loss))
        found.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
    named = model.named_parameters(remove_duplicate=False)
    found.adapter = {stored_name(name): value.detach().clone() for name, value in named if "lora_" in name}
    return found
