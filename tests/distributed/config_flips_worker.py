"""One rank: every flipped config of a family as a model, its loss on both backends beside transformers'.

torchrun --nproc-per-node 1 -m tests.distributed.config_flips_worker FAMILY OUT
"""

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.errors import UserError
from megatron_lora.policy.dtensor.policy import DTensorPolicy
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.policy.weights_check import check_base, read_base
from megatron_lora.runtime.world import World, init_distributed, init_dtensor_world, init_megatron_world
from tests.distributed.megatron_build import forget_kernels
from tests.support.config_flips import SIZES, config_content, flips
from tests.support.reference import make_rows

BACKENDS = ("megatron", "dtensor")
LONGEST = 64


def policy_config(folder: Path, backend: str) -> PolicyConfig:
    adapter = {"dim": 2, "alpha": 4}
    return PolicyConfig.model_validate(
        {
            "model_name": str(folder),
            "precision": "float32",
            "max_total_sequence_length": LONGEST,
            "train_global_batch_size": 4,
            "megatron_cfg": {"enabled": backend == "megatron", "peft": adapter},
            "dtensor_cfg": {"lora_cfg": adapter},
        }
    )


def save(folder: Path, content: dict[str, Any]) -> bool:
    """A random model of that config, and config.json as it is given; False where transformers cannot build it."""
    torch.manual_seed(0)
    plain = {key: value for key, value in content.items() if key not in ("auto_map", "quantization_config")}
    try:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[content["model_type"]].from_dict(dict(plain)))
    except Exception:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
        return False
    model = model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.dim() == 1))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))
    return True


@torch.no_grad()
def transformers_loss(folder: Path, rows: list[Row]) -> float | None:
    """None where transformers cannot compute it."""
    total = count = 0.0
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        ).eval()
        for row in rows:
            logits = model(row.input_ids[None], return_dict=True).logits[0, :-1].float()
            logps = logits.log_softmax(-1).gather(1, row.input_ids[1:, None]).squeeze(1)
            total, count = total - float((logps * row.target_mask[1:]).sum()), count + int(row.target_mask[1:].sum())
    except Exception:
        return None
    return total / count


def our_loss(folder: Path, rows: list[Row], backend: str, world: World) -> dict[str, Any]:
    """{"loss": ...}, {"refused": message}; anything else that is raised is {"broken": ...}."""
    config = policy_config(folder, backend)
    try:
        check_base(config, read_base(config))
        forget_kernels()
        kind: Any = MegatronPolicy if backend == "megatron" else DTensorPolicy
        policy = kind(config, world, pad_token_id=0, seed=1, num_steps=1)
        scores = policy.score(rows)
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    total = -sum(float((score * row.target_mask).sum()) for score, row in zip(scores, rows, strict=True))
    return {"loss": total / sum(row.num_targets for row in rows)}


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    family, out = sys.argv[1], Path(sys.argv[2])
    init_distributed()
    rows = make_rows(4, SIZES["vocab_size"], seed=5, longest=40)
    cases = list(flips(family))
    results: dict[str, dict[str, Any]] = {name: {} for name, _ in cases}
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for number, (flip, changes) in enumerate(cases):
            folders[flip] = Path(name) / str(number)
            built = save(folders[flip], config_content(family, changes))
            results[flip] = {
                "changes": changes,
                "transformers": transformers_loss(folders[flip], rows) if built else None,
            }
        for backend in BACKENDS:
            first = policy_config(next(iter(folders.values())), backend)
            world = init_megatron_world(first, 0) if backend == "megatron" else init_dtensor_world(first, 0)
            torch.set_num_threads(1)
            for flip, folder in folders.items():
                results[flip][backend] = our_loss(folder, rows, backend, world)
    (out / f"flips_{family}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
