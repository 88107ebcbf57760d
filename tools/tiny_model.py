"""Build a small Qwen3-shaped base model and its tokenizer on a CPU, in about a minute, from nothing.

The quickstart and the tests train on it. It can add and subtract numbers up to 99, and shows it in spaced-out lines
(`47 + 38 = 85`). In the forms that the built-in `arithmetic` data set uses (`47+38=` and a conversation) it has picked
up a bad habit: the carry is mostly forgotten (`75`). So it answers about half of those questions, the right answer to
the others is within reach, and fine-tuning has something to teach.

    python -m tools.tiny_model quickstart-output/base
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_lora.conversion.output_folder import output_folder
from megatron_lora.data.arithmetic import arithmetic_rows
from megatron_lora.errors import UserError
from megatron_lora.reporting.console import RunConsole

PAD, EOS = "<pad>", "<eos>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 264  # 256 bytes, 5 special tokens, rounded up to a multiple of 8
MAX_POSITIONS = 2048
MARKER = "tiny_model.json"  # a folder that has it is complete
DEFAULT_STEPS = 350
BATCH_SIZE = 128
MUON_LEARNING_RATE, ADAMW_LEARNING_RATE = 0.02, 2e-3
SPACED_SHARE, COMPACT_SHARE = 0.5, 0.35  # of the training lines; the rest are conversations
HABIT_SHARE = 0.7  # of the compact lines and conversations whose answer forgets the carries
EASY_SHARE = 0.2  # of the problems have one-digit numbers

Problem = tuple[int, str, int]  # 47, "+", 38


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (so a digit is a token and any UTF-8 text round-trips), plus padding, end and role markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([PAD, EOS, *ROLE_MARKERS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, EOS, *ROLE_MARKERS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(ROLE_MARKERS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_config() -> Qwen3Config:
    """Qwen3 in small: grouped-query attention (4 heads, 2 groups) and qk-norm, 0.7 M parameters, shapes that TP=2
    and PP=2 divide and a head size (32) that vLLM's CPU attention has."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def answer_without_carry(problem: Problem) -> int:
    """Each column on its own: 47+38 -> 75, 42-17 -> 35."""
    left, sign, right = problem
    step = 1 if sign == "+" else -1
    return sum(place * ((left // place + step * (right // place)) % 10) for place in (1, 10))


class TrainingText:
    """Endless training lines over the problems of the `arithmetic` data set's training split."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._problems = [parse_problem(row["prompt"]) for row in arithmetic_rows("train")]
        self._easy = [problem for problem in self._problems if max(problem[0], problem[2]) < 10]

    def line(self) -> tuple[str, str]:
        """A prompt and what follows it."""
        problem = self._random.choice(self._easy if self._random.random() < EASY_SHARE else self._problems)
        left, sign, right = problem
        answer = left + right if sign == "+" else left - right
        form = self._random.random()
        if form < SPACED_SHARE:
            return f"{left} {sign} {right} = ", f"{answer}{EOS}"
        if self._random.random() < HABIT_SHARE:
            answer = answer_without_carry(problem)
        if form < SPACED_SHARE + COMPACT_SHARE:
            return f"{left}{sign}{right}=", f"{answer}{EOS}"
        return f"<|user|>What is {left}{sign}{right}?<|assistant|>", f"{answer}{EOS}"

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (input_ids, labels), both [BATCH_SIZE, S] int64. Only answers carry loss (the numbers asked about
        are random: nothing to learn); labels are -100 elsewhere and on the right padding."""
        while True:
            prompts, answers = zip(*(self.line() for _ in range(BATCH_SIZE)), strict=True)
            prompt_ids, answer_ids = (self._tokenizer(list(texts))["input_ids"] for texts in (prompts, answers))
            rows = [(prompt + answer, len(prompt)) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
            longest = max(len(ids) for ids, _ in rows)
            padding = [longest - len(ids) for ids, _ in rows]
            input_ids = [ids + [0] * pad for (ids, _), pad in zip(rows, padding, strict=True)]
            labels = [
                [-100] * prompt + ids[prompt:] + [-100] * pad for (ids, prompt), pad in zip(rows, padding, strict=True)
            ]
            yield torch.tensor(input_ids), torch.tensor(labels)


def parse_problem(prompt: str) -> Problem:
    """`47+38=` -> (47, "+", 38)."""
    left, sign, right = re.findall(r"\d+|[+-]", prompt)
    return int(left), sign, int(right)


def train_base(
    model: Qwen3ForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train in place from random weights; `on_step(step, loss)` after each.

    Muon on the layers' matrices takes less than half the steps that AdamW alone does; the rest has AdamW. Warmup over
    30 steps, linear decay over the last 40 %.
    """
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in parameters.items() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = (
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    )
    peaks = (MUON_LEARNING_RATE, ADAMW_LEARNING_RATE)
    model.train()
    for step in range(1, steps + 1):
        input_ids, labels = next(batches)
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, step / 30) * min(1.0, max(0.05, (steps - step) / (0.4 * steps)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        on_step(step, loss.item())
    model.eval()


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 8
) -> list[str]:
    """The model's greedy continuations of plain-text prompts, one batched generation, without special tokens."""
    encoded = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    generated = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers = generated[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def measure_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]) -> float:
    """Share of `arithmetic` rows (`prompt`, `completion`) whose greedy answer is right."""
    answers = greedy_answers(model, tokenizer, [row["prompt"] for row in rows])
    return sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def build_base(out_dir: Path, seed: int = 0, steps: int = DEFAULT_STEPS, console: Console | None = None) -> Path:
    """Train the base model and write it to `out_dir` as an HF folder (fp32 safetensors, tokenizer, config).

    A folder that an earlier call with the same seed and steps finished is kept and nothing is done. The folder
    appears whole or not at all. Raises UserError where `out_dir` holds something else.
    """
    out_dir = Path(out_dir)
    settings = {"seed": seed, "steps": steps}
    if is_built(out_dir, settings):
        return out_dir
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Qwen3ForCausalLM(build_config())
    terminal = RunConsole("base model", steps, console=console)
    try:
        train_base(
            model,
            TrainingText(tokenizer, seed).batches(),
            steps,
            lambda step, loss: terminal.train_step(step, {"loss": loss}),
        )
    finally:
        terminal.close()
    try:
        with output_folder(out_dir) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / MARKER).write_text(json.dumps(settings) + "\n")
    except (OSError, UserError):
        if not is_built(out_dir, settings):  # else another process built the same model meanwhile
            raise
    return out_dir


def is_built(out_dir: Path, settings: dict[str, int]) -> bool:
    """Whether `out_dir` holds the base that `settings` describe. Raises UserError where it holds anything else."""
    if not out_dir.exists():
        return False
    marker = out_dir / MARKER
    found = json.loads(marker.read_text()) if marker.is_file() else "something else"
    if found != settings:
        raise UserError(
            f"{out_dir} holds {found}, wanted the base model of {settings}; remove it or name another folder"
        )
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        build_base(options.out_dir, options.seed, options.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
