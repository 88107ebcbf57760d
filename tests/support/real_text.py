"""Rows of real text for SmolLM2 (tools/smollm2.py): word problems in its chat template."""

import functools
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_lora.data.batch import Row
from tests.support.trainer import gsm8k_rows
from tools.smollm2 import cached_model


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(cached_model())


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of questions, about 70 each, ready for an answer."""
    return [_prompt(row["question"]) for row in gsm8k_rows(count, seed)]


def text_rows(count: int, seed: int = 0, questions: int = 1) -> list[Row]:
    """Conversations; the answers, and the token that ends each, carry loss. questions: asked one after the other in one
    row."""
    rows = []
    for index in range(count):
        ids: list[int] = []
        mask: list[bool] = []
        for row in gsm8k_rows(questions, seed * 1000 + index):
            question, answer = _prompt(row["question"]), tokenizer()(row["answer"])["input_ids"]
            ids += [*question, *answer, tokenizer().eos_token_id]
            mask += [False] * len(question) + [True] * (len(answer) + 1)
        rows.append(Row(input_ids=torch.tensor(ids), target_mask=torch.tensor(mask), index=index))
    return rows


def _prompt(question: str) -> list[int]:
    conversation = [{"role": "user", "content": question}]
    return tokenizer().apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
