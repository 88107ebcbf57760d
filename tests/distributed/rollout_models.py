"""What the vLLM tests start from: small bases, adapters of several kinds, a tokenizer, and peft's own numbers."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.policy.interface import AdapterTensors
from tests.support.models import SIZES, save_model
from tests.support.reference import TARGETS, save_adapter

VOCAB = int(SIZES["vocab_size"])
FAMILIES = ("qwen3", "llama3")
# What cuts the tail off: with a temperature, which comes first.
CUTS = {
    "top_k": {"temperature": 1.0, "top_k": 4},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "both": {"temperature": 1.5, "top_k": 30, "top_p": 0.7},
}


def build(folder: Path) -> None:
    """Bases, an adapter of all linears each, the head too, and one for qwen3 whose linears differ in A, rank and
    scale."""
    for family in FAMILIES:
        save_model(folder / family, family)
        save_adapter(folder / family, folder / f"{family}_adapter", targets=[*TARGETS, "lm_head"])
        _save_tokenizer(folder / family)
    _save_uneven_adapter(folder / "qwen3", folder / "uneven_adapter")


def _save_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", unk_token="w1").save_pretrained(folder)


def _save_uneven_adapter(base: Path, folder: Path) -> None:
    torch.manual_seed(5)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=TARGETS,
        rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 5, "down_proj": 3},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def read_adapter(folder: Path) -> AdapterTensors:
    config = json.loads((folder / "adapter_config.json").read_text())
    return AdapterTensors(config, load_file(folder / "adapter_model.safetensors"))


def write_adapter(adapter: AdapterTensors, folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    save_file(adapter.tensors, folder / "adapter_model.safetensors")
    return folder


def policy_config(
    folder: Path, family: str, *, vllm_tp: int, precision: str = "float32", **megatron: object
) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "model_name": str(folder / family),
            "precision": precision,
            "max_total_sequence_length": 256,
            "train_global_batch_size": 4,
            "megatron_cfg": {
                "enabled": True,
                "peft": {"enabled": True, "init_adapter": str(folder / f"{family}_adapter")},
                "optimizer": {"lr": 1e-2},
                "scheduler": {"lr_decay_style": "constant"},
            }
            | megatron,
            "generation": {"vllm_cfg": {"tensor_parallel_size": vllm_tp}, "stop_strings": ["w77"]},
        }
    )


class Reference:
    """transformers + peft on the same tokens."""

    def __init__(self, base: Path, adapter: Path | None):
        model = AutoModelForCausalLM.from_pretrained(base)
        self.model = model if adapter is None else PeftModel.from_pretrained(model, adapter)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].float()

    def completion_logps(self, prompt: list[int], completion: list[int], *, top_k: int = -1, top_p: float = 1.0):
        """[completion] log-probabilities in the distribution that is left after top-k and top-p."""
        logits = self.logits(prompt + completion)[len(prompt) - 1 : -1]
        if top_k > 0:
            smallest = logits.topk(top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        if top_p < 1:
            ordered, index = logits.sort(-1, descending=True)
            mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, mass_before >= top_p)
            logits = logits.masked_fill(dropped, float("-inf"))
        return F.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)

    def merged_weights(self) -> dict[str, torch.Tensor]:
        return self.model.merge_and_unload().state_dict()


def as_row(ids: list[int]) -> Row:
    return Row(input_ids=torch.tensor(ids), target_mask=torch.arange(len(ids)) > 0)


def prompts() -> list[list[int]]:
    """Of several lengths; the second is longer than a block of vLLM's CPU cache (128)."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in (5, 140, 20, 33)]
