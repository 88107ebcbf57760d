"""GSM8K's test questions answered greedily by vLLM, by the base model and by adapters, and how many are right.

    MEGATRON_LORA_GSM8K=<folder> python -m tools.bench.gsm8k_accuracy MODEL --out accuracy.json sft=ADAPTER ...

The adapters are read by vLLM from their PEFT folders, so this measures what a run exports and not what it trained.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_lora.data.sources import GSM8K_VARIABLE
from megatron_lora.errors import UserError
from megatron_lora.rollout.rewards import RewardRunner, RewardSample, RewardSpec
from megatron_lora.rollout.vllm_engine import CPU_ENVIRONMENT, ENVIRONMENT

LONGEST, LONGEST_ANSWER, LARGEST_RANK = 768, 256, 32
BASE = "base"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.gsm8k_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", nargs="*", help=f"name=folder; the name {BASE} and no folder: without adapter")
    parser.add_argument("--out", type=Path, required=True, help="JSON; what it holds already is kept")
    parser.add_argument("--questions", type=int, default=None, help="only so many of the 1,319")
    return parser.parse_args(arguments)


def read_questions(count: int | None) -> list[dict[str, str]]:
    folder = os.environ.get(GSM8K_VARIABLE)
    if not folder or not (Path(folder) / "test.jsonl").is_file():
        raise UserError(f"set {GSM8K_VARIABLE} to a folder that holds GSM8K's test.jsonl")
    return [json.loads(line) for line in (Path(folder) / "test.jsonl").read_text().splitlines()][:count]


def start_engine(model: Path) -> Any:
    on_gpu = torch.cuda.is_available()
    for name, value in (ENVIRONMENT if on_gpu else ENVIRONMENT | CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    device: dict[str, Any] = {"gpu_memory_utilization": 0.6} if on_gpu else {"kv_cache_memory_bytes": 1 << 30}
    return LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=LONGEST,
        enable_lora=True,
        max_lora_rank=LARGEST_RANK,
        enforce_eager=not on_gpu,
        generation_config="vllm",
        **device,
    )


def measure(engine: Any, adapter: tuple[int, str, str] | None, rows: list[dict[str, str]], tokenizer: Any) -> dict:
    """The share of right answers, and what they were like. adapter: (number, name, folder)."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    params = SamplingParams(temperature=0.0, max_tokens=LONGEST_ANSWER, stop_token_ids=[tokenizer.eos_token_id])
    request = None if adapter is None else LoRARequest(adapter[1], adapter[0], adapter[2])
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, lora_request=request)
    texts = [output.outputs[0].text for output in outputs]
    samples = [RewardSample(row["question"], text, row["answer"], {}) for row, text in zip(rows, texts, strict=True)]
    with RewardRunner([RewardSpec("gsm8k")]) as runner:
        right = [outcome.total or 0.0 for outcome in runner(samples)]
    finished = [output.outputs[0].finish_reason == "stop" for output in outputs]
    return {
        "questions": len(rows),
        "exact": sum(right) / len(rows),
        "ended_by_themselves": sum(finished) / len(rows),
        "mean_tokens": sum(len(output.outputs[0].token_ids) for output in outputs) / len(rows),
        "first_answers": texts[:2],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        rows = read_questions(options.questions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    engine = start_engine(options.model)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for number, entry in enumerate(options.adapters, start=1):
        name, _, folder = entry.partition("=")
        found[name] = measure(engine, (number, name, folder) if folder else None, rows, tokenizer)
        print(f"{name}: {found[name]['exact']:.2%} of {len(rows)} exact", flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
