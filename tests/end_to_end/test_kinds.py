"""SFT, DPO and GRPO from the command line with kinds of adapters other than LoRA: a resumed run is the same run, what
it exports loads in a stock peft, and that model's numbers are the run's own."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lora.data.batch import Row
from tests.support.four_bit import save_dequantized
from tests.support.reference import sum_of_target_logps
from tests.support.runs import adapter_of, arithmetic_preferences, metrics, run, save_base, write_lines

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

STEPS, BETA = 4, 0.1
MEASURED = ("seconds", "per_second", "memory")
QWEN3 = {"intermediate_size": 128}  # whole blocks of 4 bits in each row, at TP=2 too
KINDS: dict[str, dict[str, Any]] = {
    "dora_by_linear": {
        "type": "dora",
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, "linear_fc2": 6},
        "alpha_pattern": {"o_proj": 3},
    },
    "qlora": {"quantization": "nf4", "double_quantization": True, "lora_dtype": "float32", "lora_plus_ratio": 4.0},
    "pissa": {"init_lora_weights": "pissa"},
    "canonical_saved": {"type": "canonical_lora", "modules_to_save": ["input_layernorm", "norm", "lm_head"]},
}
RATES = {"sft": 1e-2, "dpo": 1e-3, "grpo": 1e-2}


class Room:
    """base, dequantized: the model, and what a run in 4 bits computes with. validated: the rows of the validation."""

    def __init__(self, folder: Path):
        self.base = save_base(folder / "base", **QWEN3)
        self.dequantized = save_dequantized(self.base, folder / "dequantized", double=True)
        self.validated = arithmetic_preferences(8, "validation")
        self.data: dict[str, dict[str, Any]] = {}
        for algorithm in ("sft", "dpo"):
            for split, pairs in (("train", arithmetic_preferences(64)), ("validation", self.validated)):
                answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
                path = write_lines(folder / f"{algorithm}_{split}.jsonl", answers if algorithm == "sft" else pairs)
                self.data.setdefault(algorithm, {})[split] = {"data_path": str(path)}
        self.data["grpo"] = {"train": {"dataset_name": "arithmetic"}}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("kinds"))


def recipe(algorithm: str, room: Room, peft: dict[str, Any]) -> dict[str, Any]:
    """Four steps at TP=2, a checkpoint after two; validation at the end."""
    values: dict[str, Any] = {
        algorithm: {"max_num_steps": STEPS, "val_period": STEPS if algorithm != "grpo" else 0},
        "policy": {
            "model_name": str(room.base),
            "precision": "float32",
            "train_global_batch_size": 8,
            "train_micro_batch_size": 4,
            "max_total_sequence_length": 32,
            "megatron_cfg": {
                "enabled": True,
                "tensor_model_parallel_size": 2,
                "peft": {"enabled": True, "dim": 4, "alpha": 8} | peft,
                "optimizer": {"lr": RATES[algorithm]},
            },
        },
        "data": room.data[algorithm],
        "checkpointing": {"save_period": 2, "keep_top_k": None},
    }
    if algorithm == "dpo":
        values["dpo"] |= {"reference_policy_kl_penalty": BETA}
    if algorithm == "grpo":
        values["grpo"] |= {"num_prompts_per_step": 4, "num_generations_per_prompt": 4}
        reward = {"kind": "python", "name": "digits", "function": "tests.support.rewards:digit_share"}
        values["env"] = {"reward_functions": [reward]}
        values["policy"]["generation"] = {"max_new_tokens": 8, "backend": "megatron"}
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", RATES)
def test_a_resumed_run_is_the_same_run_and_its_adapter_is_pefts(
    algorithm: str, kind: str, room: Room, tmp_path: Path
) -> None:
    peft = KINDS[kind]
    whole = run(tmp_path / "whole", recipe(algorithm, room, peft), 2)
    resumed = run(before_the_end(whole, tmp_path / "resumed"), recipe(algorithm, room, peft), 2)
    assert numbers(resumed) == numbers(whole) and len(metrics(whole)) == STEPS
    first, second = (adapter_of(folder / f"step_{STEPS}") for folder in (resumed, whole))
    assert first.keys() == second.keys() and all(torch.equal(first[name], value) for name, value in second.items())

    model = loaded_by_peft(whole / f"step_{STEPS}" / "hf_adapter", room, peft)
    if algorithm == "grpo":
        assert max(line["rollout_logprob_error"] for line in metrics(whole)) < 1e-5
    else:
        wanted, moved = loss(algorithm, model, AutoTokenizer.from_pretrained(room.base), room.validated)
        assert [line["loss"] for line in metrics(whole, "validation")] == [pytest.approx(wanted, rel=1e-4)]
        # An adapter without effect would be as good.
        assert moved > 1e-2


def before_the_end(whole: Path, folder: Path) -> Path:
    """The run as it was after half of its steps."""
    shutil.copytree(whole, folder / "run")
    shutil.rmtree(folder / "run" / f"step_{STEPS}")
    (folder / "run" / "latest_step.txt").write_text(f"{STEPS // 2}\n")
    return folder


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All that is logged of every step, but for what was measured of the machine."""
    lines = [*metrics(folder), *metrics(folder, "validation")]
    return [
        {name: value for name, value in line.items() if not any(part in name for part in MEASURED)} for line in lines
    ]


def loaded_by_peft(folder: Path, room: Room, peft: dict[str, Any]) -> Any:
    """A stock peft's model of an exported folder, no tensor of which is left over, and none missing."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] == (peft.get("type") == "dora") and config["use_rslora"] == bool(peft.get("use_rslora"))
    base = AutoModelForCausalLM.from_pretrained(room.dequantized if "quantization" in peft else room.base)
    model = PeftModel.from_pretrained(base, folder)
    missing, unexpected = model.load_adapter(folder, "again")
    assert not unexpected and not [name for name in missing if ".again." in name]
    model.set_adapter("default")
    ranks = {name: len(factor) for name, factor in model.named_parameters() if ".lora_A.default." in name}
    # What trains against the residual is an adapter of twice the rank against the base.
    plain = 8 if "init_lora_weights" in peft else 4
    for linear, pattern in (("q_proj", ""), ("v_proj", "v_proj"), ("down_proj", "linear_fc2")):
        rank = peft.get("rank_pattern", {}).get(pattern, plain)
        assert {found for name, found in ranks.items() if linear in name} == {rank}
    return model


def loss(algorithm: str, model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> tuple[float, float]:
    """What SFT on the right answers, or DPO against the model with its adapter off, comes to; and by how many nats the
    adapter moves a pair's margin, at most."""
    chosen, rejected = (
        [row_of(tokenizer, pair["prompt"], pair[name]) for pair in pairs] for name in ("chosen", "rejected")
    )

    def margins() -> list[float]:
        right, wrong = ([float(sum_of_target_logps(model, [row])) for row in rows] for rows in (chosen, rejected))
        return [one - other for one, other in zip(right, wrong, strict=True)]

    with torch.no_grad():
        with model.disable_adapter():
            before = margins()
        moves = [now - then for now, then in zip(margins(), before, strict=True)]
        sft = -float(sum_of_target_logps(model, chosen)) / sum(row.num_targets for row in chosen)
    dpo = sum(math.log1p(math.exp(-BETA * move)) for move in moves) / len(moves)
    return {"sft": sft, "dpo": dpo}[algorithm], max(map(abs, moves))


def row_of(tokenizer: Any, prompt: str, answer: str) -> Row:
    """The texts one after the other with an end; the answer and the end carry loss."""
    head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    ids = torch.tensor([*head, *tail, tokenizer.eos_token_id])
    return Row(input_ids=ids, target_mask=torch.arange(len(ids)) >= len(head))
