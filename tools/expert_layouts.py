"""Whether vLLM computes with adapters on experts, by layout of the factors: its log-probabilities against peft's.

    python -m tools.expert_layouts --out layouts --device cuda

An engine may load a layout and use none of it: what counts is how far its numbers are from peft's (`error`), beside how
far the base's own are (`without`). Each layout has an engine in a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_lora.conversion.export import read_peft_folder, write_peft_folder
from megatron_lora.conversion.hf_model import read_hf_model
from megatron_lora.lora.peft_format import ExpertLayout, to_hf
from megatron_lora.lora.peft_reading import from_hf
from tools.bench.options import build_parser, check_out
from tools.bench.task import save_random_model, shape_of

LAYOUTS: tuple[ExpertLayout, ...] = ("each", "packed")
RANK, ALPHA, STD = 4, 8, 0.2
PROMPTS = 4, 24  # how many, and tokens of each


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser("tools.expert_layouts", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models, adapters and results.json")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.layout:
        print(json.dumps(engine_logps(options.out, options.layout, options.device)), flush=True)
        return 0
    check_out(options.out)
    options.out.mkdir(parents=True)
    wanted, without = prepare(options.out)
    results = {}
    for layout in LAYOUTS:
        command = [sys.executable, "-m", "tools.expert_layouts", "--out", str(options.out), "--layout", layout]
        done = subprocess.run([*command, "--device", options.device], capture_output=True, text=True)
        (options.out / f"{layout}.log").write_text(done.stdout + done.stderr)
        results[layout] = {"without": distance(without, wanted)} | compared(done, wanted)
        print(f"{layout}: {json.dumps(results[layout])}", flush=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


def compared(done: subprocess.CompletedProcess[str], wanted: list[list[float]]) -> dict[str, Any]:
    if done.returncode == 0:
        return {"error": distance(json.loads(done.stdout.splitlines()[-1]), wanted)}
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"failed": lines[-1] if lines else f"status {done.returncode}"}


def distance(found: list[list[float]], wanted: list[list[float]]) -> float:
    """Mean over tokens, nats."""
    return float((torch.tensor(found) - torch.tensor(wanted)).abs().mean())


def prompts() -> list[list[int]]:
    count, length = PROMPTS
    return torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def prepare(out: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Base and adapters. Log-probabilities of the prompts' tokens, in fp32: by peft, and by the base alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = out / "base"
    save_random_model(shape_of("tiny-experts"), base, "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], target_parameters=targets)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=STD)
    adapted.save_pretrained(str(out / "drawn"))
    wanted = token_logps(adapted)
    with adapted.disable_adapter():
        without = token_logps(adapted)
    settings, tensors = read_peft_folder(out / "drawn")
    spec, factors = from_hf(settings, tensors, read_hf_model(base).shapes, str(base))
    for layout in LAYOUTS:
        write_peft_folder(out / layout, *to_hf(spec, factors, experts=layout))
    return wanted, without


@torch.no_grad()
def token_logps(model: Any) -> list[list[float]]:
    ids = torch.tensor(prompts())
    logps = model(ids).logits.float().log_softmax(-1)
    return logps[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).tolist()


def engine_logps(out: Path, layout: str, device: str) -> list[list[float]]:
    import os

    from megatron_lora.rollout.vllm_engine import CPU_ENVIRONMENT, ENVIRONMENT

    os.environ.update(ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {}))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    on_cpu: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 26} if device == "cpu" else {"gpu_memory_utilization": 0.2}
    llm = LLM(
        model=str(out / "base"),
        dtype="float32" if device == "cpu" else "bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        enable_prefix_caching=False,
        **on_cpu,
    )
    options = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    given: Any = [{"prompt_token_ids": ids} for ids in prompts()]
    request = LoRARequest(layout, 1, str(out / layout))
    answers = llm.generate(given, options, lora_request=request, use_tqdm=False)
    return [
        [one[token].logprob for one, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]  # type: ignore[index]
        for answer, ids in zip(answers, prompts(), strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
