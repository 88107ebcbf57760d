"""An answer of the trained model, for whoever looks at the end of a run. GRPO shows one of those it has drawn."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_lora.data.batch import Row
from megatron_lora.data.loader import GroupLoader
from megatron_lora.data.tokenizer import end_tokens
from megatron_lora.errors import UserError
from megatron_lora.rollout.generator import RolloutError, SamplingOptions
from megatron_lora.runtime.activity import begin
from megatron_lora.trainers.session import Session

LONGEST_ANSWER = 64  # tokens
LONGEST_CELL = 400


def show_last_answer(session: Session, loader: GroupLoader[list[Row]]) -> None:
    """The most likely answer to the first prompt of `loader`, beside the one it has (DPO: the chosen one). Nothing
    where a run ended before its last step, or where the layout has no answers. Collective."""
    if session.step < session.total_steps:
        return
    row = loader.dataset[0][0]
    prompt, wanted = split_row(row)
    begin("answering a prompt at the end")
    try:
        answer = _answer(session, prompt)
    except (UserError, RolloutError, torch.OutOfMemoryError):
        return  # the run itself is done and saved
    cells = [session.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, answer, wanted)]
    session.reporter.table(
        f"the model's answer after step {session.step}", ("prompt", "answer", "in the data"), [shorten(cells)]
    )


def split_row(row: Row) -> tuple[list[int], list[int]]:
    """The tokens before the first answer of a row, and that answer's."""
    mask = row.target_mask.tolist()
    first = mask.index(True)
    end = mask.index(False, first) if False in mask[first:] else len(mask)
    ids = row.input_ids.tolist()
    return ids[:first], ids[first:end]


def shorten(cells: Sequence[Any]) -> list[Any]:
    """A row of a table with its long texts cut."""
    return [
        f"{cell[:LONGEST_CELL]}..." if isinstance(cell, str) and len(cell) > LONGEST_CELL else cell for cell in cells
    ]


def _answer(session: Session, prompt: list[int]) -> list[int]:
    """Raises UserError where this layout cannot answer."""
    policy = session.recipe.policy
    ends = end_tokens(policy.model_name, session.tokenizer)
    limit = min(LONGEST_ANSWER, policy.max_total_sequence_length - len(prompt))
    if policy.backend == "megatron":
        from megatron_lora.rollout.native import NativeGenerator

        options = SamplingOptions(limit, temperature=0.0, stop_token_ids=tuple(ends))
        return NativeGenerator(session.policy, session.tokenizer).generate([prompt], 1, options)[0].completion_ids
    from megatron_lora.policy.dtensor.policy import DTensorPolicy

    assert isinstance(session.policy, DTensorPolicy)
    return session.policy.most_likely(prompt, limit, ends)
