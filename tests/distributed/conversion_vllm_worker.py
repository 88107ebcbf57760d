"""vLLM on a CPU: log-probabilities of fixed tokens with exported adapters, and of merged exports.

python -m tests.distributed.conversion_vllm_worker FOLDER BASE ADAPTER... [--merged FOLDER...]

Writes FOLDER/vllm_BASE.json: for the base, each adapter and each merged model the prompt's log-probabilities (nats).
"""

import gc
import json
import os
import sys
from pathlib import Path

# Set before vllm is imported: no compiling, one process, a small cache.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.inputs import TokensPrompt  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from tests.distributed.conversion_cases import prompt  # noqa: E402


def start(model: Path, *, lora: bool) -> LLM:
    return LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        enable_prefix_caching=False,
        enable_lora=lora,
        **({"max_lora_rank": 8} if lora else {}),
    )


def score(engine: LLM, request: LoRARequest | None = None) -> list[float]:
    """[S - 1] of the prompt's tokens from the second on."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    tokens = prompt()
    output = engine.generate([TokensPrompt(prompt_token_ids=tokens)], sampling, lora_request=request, use_tqdm=False)
    logprobs = output[0].prompt_logprobs
    return [logprobs[index][token].logprob for index, token in enumerate(tokens) if index > 0]


def main(folder: Path, base: str, adapters: list[str], merged: list[str]) -> None:
    found: dict[str, list[float]] = {}
    engine = start(folder / base, lora=True)
    found[base] = score(engine)
    for number, name in enumerate(adapters, start=1):
        found[name] = score(engine, LoRARequest(name, number, str(folder / name)))
    for name in merged:
        del engine
        gc.collect()
        engine = start(folder / name, lora=False)
        found[name] = score(engine)
    (folder / f"vllm_{base}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--merged")
    main(Path(arguments[0]), arguments[1], arguments[2:split], arguments[split + 1 :])
