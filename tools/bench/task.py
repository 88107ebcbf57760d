"""What one engine is asked to measure, and the random model and rows that all engines share."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from megatron_lora.errors import UserError

_QWEN = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@dataclass(frozen=True)
class Shape:
    """sizes: of a Qwen2.5 configuration, or of a Qwen3-MoE one where there are experts. rows x length: tokens of a
    step, one micro-batch."""

    sizes: dict
    rows: int
    length: int


# A layer of Qwen3-30B-A3B: 3.3B of 30.5B parameters are used for a token at 48 layers.
_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}

SHAPES = {
    "qwen2.5-1.5b": Shape(
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        rows=4,
        length=4096,
    ),
    "qwen2.5-0.5b": Shape(
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        rows=4,
        length=4096,
    ),
    "qwen2.5-3b": Shape(
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        rows=4,
        length=4096,
    ),
    "qwen2.5-7b": Shape(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        rows=2,
        length=4096,
    ),
    "qwen2.5-32b": Shape(
        {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        rows=1,
        length=4096,
    ),
    "qwen3-30b-a3b": Shape(_A3B | {"num_hidden_layers": 48}, rows=2, length=4096),
    "qwen3-30b-a3b-12-layers": Shape(_A3B | {"num_hidden_layers": 12}, rows=4, length=4096),
    # Its sizes in Qwen2's architecture, which has biases that SmolLM2 has not.
    "smollm2-135m": Shape(
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        rows=4,
        length=1600,
    ),
    "tiny-experts": Shape(
        {
            "hidden_size": 128,
            "intermediate_size": 96,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 264,
            "tie_word_embeddings": False,
        },
        rows=2,
        length=32,
    ),
    "tiny": Shape(
        {
            "hidden_size": 128,  # heads of 32, which vLLM's CPU attention has
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 264,
            "tie_word_embeddings": True,
        },
        rows=2,
        length=32,
    ),
}

# Adapters on the experts of a shape that has them: one pair for each, or one for all of a layer. Without: on attention.
Experts = Literal["each", "shared"]


@dataclass(frozen=True)
class Task:
    """One engine's measurement. model: Hugging Face folder as `random_weights` writes it. rows x length: tokens of a
    step, `length` of them a sequence. chunk: tokens of a chunk of this project's head. sweep: further chunk sizes to
    measure. tp, sp, pp, cp: the layout, the last two of this project's engines alone. recompute: activations in the
    backward pass (ours). micro_batches: parts of a step's rows (ours). gate: a file; the engine imports what it needs,
    and touches no device before the file is there."""

    engine: str
    model: str
    device: str
    rows: int
    length: int
    rank: int
    warmup: int
    steps: int
    chunk: int
    sweep: list[int]
    tp: int
    sp: bool
    profile: str | None
    result: str
    pp: int = 1
    cp: int = 1
    recompute: bool = False
    micro_batches: int = 1
    gate: str | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Task":
        return cls(**json.loads(path.read_text()))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def input_ids(self, vocab_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The same random tokens for every engine: [rows, length]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab_size, (self.rows, self.length), generator=generator).to(device)


def shape_of(name: str) -> Shape:
    if name not in SHAPES:
        raise UserError(f"--shape {name!r} is not known; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def parameters_of(shape: Shape) -> int:
    """Of a Qwen2.5 shape, without those of norms and biases."""
    sizes = shape.sizes
    assert "num_experts" not in sizes, "shapes with experts are not counted"
    hidden = sizes["hidden_size"]
    key_value = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * sizes["intermediate_size"]
    embeddings = sizes["vocab_size"] * hidden * (1 if sizes["tie_word_embeddings"] else 2)
    return layer * sizes["num_hidden_layers"] + embeddings


def config_of(shape: Shape) -> PretrainedConfig:
    kind = Qwen3MoeConfig if "num_experts" in shape.sizes else Qwen2Config
    return kind(**_QWEN, **shape.sizes, architectures=[kind.__name__.replace("Config", "ForCausalLM")])


def save_random_model(shape: Shape, folder: Path, device: str) -> None:
    """Write a random model of the shape, bf16 on a GPU and fp32 on a CPU; left alone where it is there already."""
    if (folder / "config.json").exists():
        return
    config = config_of(shape)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    temporary = folder.with_name(folder.name + ".part")
    model.save_pretrained(temporary)
    temporary.rename(folder)
