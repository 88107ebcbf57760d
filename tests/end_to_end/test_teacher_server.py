"""Distillation whose teacher is a real vLLM server, asked for its most likely tokens."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_lora.policy.heads import MostLikely
from megatron_lora.rollout.teacher import TeacherServers
from tests.end_to_end.test_grpo import recipe
from tests.support.launch import ROOT
from tests.support.runs import metrics, run, save_base
from tools.tiny_model import build_tokenizer

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
NUM_CANDIDATES, START_SECONDS = 8, 600
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("teacher") / "model", initializer_range=0.1)


@pytest.fixture(scope="module")
def url(teacher: Path) -> Iterator[str]:
    """As a user starts one, with room for the candidates."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(teacher), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "64", "--max-logprobs", str(NUM_CANDIDATES), "--enforce-eager"]
    log = teacher.with_name("server.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            ["env", *(f"{name}={value}" for name, value in ENVIRONMENT.items()), *command],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline, address = time.monotonic() + START_SECONDS, f"http://127.0.0.1:{port}"
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    yield address
    process.terminate()
    process.wait(60)


def test_a_servers_most_likely_tokens_are_the_models(teacher: Path, url: str) -> None:
    servers = TeacherServers([url], None, 60.0, 4, 32, NUM_CANDIDATES)
    servers.start(build_tokenizer(), ["12+34=", "7*8="])
    draws = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 90, (length,), generator=draws).tolist() for length in (2, 9, 31)]
    model = AutoModelForCausalLM.from_pretrained(teacher)
    for row, scores in zip(rows, servers.score(rows), strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        drawn, logps, ids = (part[1:] for part in MostLikely(NUM_CANDIDATES).parts(scores))
        best = wanted.topk(NUM_CANDIDATES, dim=1)
        assert (drawn - wanted.gather(1, torch.tensor(row[1:])[:, None])[:, 0]).abs().max() < 1e-4
        assert (logps - best.values).abs().max() < 1e-4
        # The very tokens, whatever the order of two that are as likely.
        assert (wanted.gather(1, ids.long()) - best.values).abs().max() < 1e-4


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_run_comes_nearer_to_it(divergence: str, url: str, tmp_path: Path) -> None:
    values = recipe(save_base(tmp_path / "base"), {"backend": "megatron"}, max_num_steps=12, val_period=0)
    values["distillation"] = values.pop("grpo") | {"topk_logits_k": NUM_CANDIDATES}
    values["loss_fn"] = {"kl_type": divergence}
    values["teacher"] = {"urls": [url]}
    # The head too: the linears of two random layers alone move the distribution little.
    linears = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"]
    values["policy"]["megatron_cfg"]["peft"] |= {"target_modules": linears}
    lines = metrics(run(tmp_path, values, 1))
    name = f"{divergence}_kl"
    assert lines[-1][name] < 0.9 * lines[0][name], [line[name] for line in lines]
    assert all(0 < line["teacher_candidate_mass"] < 1 for line in lines)
