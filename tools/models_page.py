"""Write docs/models.md: every decoder that megatron-bridge maps and transformers knows, and what became of trying it.

    python -m tools.models_page                 # every family
    python -m tools.models_page FAMILY ...      # these; the other rows stay as they are

A family that is not refused is tried as a small random model in fp32, in one process: log-probabilities of the Megatron
backend against transformers', and Hugging Face to a Megatron checkpoint and back, bit for bit. Each row says with which
command it was written, at which commit and when.
"""

import argparse
import dataclasses
import logging
import subprocess
import tempfile
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.safetensors_io import SafetensorsFolder, tensor_bytes
from megatron_lora.conversion.tower import WITH_TOWER
from megatron_lora.conversion.whole_model import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_lora.data.batch import Row
from megatron_lora.errors import UserError
from megatron_lora.lora.families import families, unknown_reason
from megatron_lora.policy.weights_check import MEGATRON_FAMILIES, check_base, read_base
from megatron_lora.runtime.world import init_megatron_world
from tools.small_sizes import LINEAR_ATTENTION, MAMBA
from tools.towers import tower_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "sliding_window": 8,
    **LINEAR_ATTENTION,
    "shared_expert_intermediate_size": 56,
    **MAMBA,
    "layers_block_type": ["mamba", "attention", "mlp", "mamba", "moe"],
    # The limit that transformers' path on a CPU has, and its kernels do not.
    "time_step_min": 1e-9,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADING = """# Models

Written by `python -m tools.models_page` (megatron-bridge {bridge}, megatron-core {core}, transformers {hf}): every
causal language model that megatron-bridge maps. The last column is the command that tries the row again, the commit at
which it was tried, and the date.

- **trains**: adapters, checkpoints, export, import and merging work on the Megatron backend. The numbers are of a small
  random model in fp32, in one process: the largest difference of a log-probability to transformers', and whether
  Hugging Face to a Megatron checkpoint and back is the same bits. Layouts, ten training steps and resuming are compared
  in tests/distributed (`test_megatron_logits.py`, `test_megatron_experts.py`, `test_megatron_parity.py`).
- **not verified**: the description (docs/architecture.md) has a place for every tensor, but the model was not built
  with Megatron-Core's layers and compared; the Megatron backend refuses it. The DTensor backend takes it, untested,
  unless its files are not read: then both refuse it with the words in brackets.
- **refused**: neither backend takes it, for the reason in brackets, which a run gives before it reads a weight.

Models with experts: adapters go on attention, and on the experts where their linears are named
([adapters.md](adapters.md#experts)), and on the router where it is named. Expert parallelism (EP) and expert tensor
parallelism (ETP) split the experts, and TP above 1 needs sequence parallelism. Full fine-tuning of such a model and
native rollouts at EP above 1 are refused.
Shared experts are adapted as an MLP is; the bias by which a router chooses stays frozen. Latent attention (DeepSeek,
GLM-4.7-Flash) has adapters on its own linears: `linear_q_proj`, or `linear_q_down_proj` and `linear_q_up_proj`;
`linear_kv_down_proj`, `linear_kv_up_proj`, `linear_proj`. The two down projections are whole on every TP rank.
DeepSeek-V2 is taken with `topk_method: greedy` (V2-Lite) alone. The experts of GPT-OSS, one tensor a layer with biases,
are not split (ETP); its weights are read in bfloat16, not in MXFP4. Layers that predict further
tokens (`num_nextn_predict_layers`) are not computed: they stay as they are, and a merged export has them.
Of a vision-language model (Gemma 3, InternVL, LLaVA, Mistral 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5) the language
model trains, on text, with adapters. The description has its names in transformers' whole model
(`model.language_model.`), which an exported adapter has too: peft loads it on the whole model. The vision tower and the
projector stay as they are, and a merged export has them, under the names of the files that it was made from. GRPO draws
answers with the training model (`policy.generation.backend=megatron`); in vLLM such a model is refused, and that vLLM
serves an exported adapter over it was not tried.
Linear attention (the gated delta net of Qwen3-Next and of Qwen3.5's language model) is plain PyTorch here, also on a
GPU (docs/benchmarks.md, "GPU tests"): each row of a packed micro-batch begins with an empty state. Adapters go on its
`in_proj` (`in_proj_qkvz`, `in_proj_ba`; Qwen3.5: `in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a`) and `out_proj`.
A model without experts trains whole, too. Under context parallelism ranks exchange the tokens that they have for heads
before the convolution, and back after the recurrence: each computes some key heads for whole rows, so TP x CP divides
the key heads. On the DTensor backend, which trains transformers' own modules, tensor parallelism is refused
(transformers plans none). The training model answers for GRPO, with a state for each row beside the caches of
attention; vLLM is given merged weights.
Files of Qwen3.5's mixtures that hold one tensor of all experts of a layer are read, and written again, as such.
Nemotron-H's layers are one thing each: Mamba-2, attention, an MLP, or experts. Its Mamba mixer is plain PyTorch here
too, since Megatron-Core's own cannot be built without the packages mamba-ssm and causal-conv1d; on a GPU it has
trained and drawn answers. Adapters go on the mixer's `in_proj`, on attention, MLPs and shared experts, and on experts,
router and the mixer's `out_proj` where they are named, under transformers' names (`model.layers.0.mixer.in_proj`;
files say `backbone.`). PEFT loads none on `out_proj`: such an adapter is merged. Step sizes have no lower limit, as in
the kernels; transformers' own path on a CPU has one (`time_step_min`), which the DTensor backend does without: where
the kernels are not installed it computes with the scan of the Megatron backend. What holds for linear attention holds
here: context parallelism by groups of heads, merged weights for vLLM, which runs Mamba on a GPU alone (not seen yet).
NeMo RL's four LoRA recipes of Nemotron 3 Nano (GRPO, SFT on FSDP) pass `--dry-run` with a small model of the
architecture.
The dense Nemotron (squared ReLU, LayerNorm with 1 + weight) trains on the Megatron backend alone: transformers' class
computes its attention itself and takes no packed rows; its norms do not train beside adapters. EXAONE 4 and
EXAONE MoE have rotary embeddings in the layers with a window alone, where there are such. The experts of Ernie 4.5 are
chosen as transformers does (softmax and bias; megatron-bridge takes a sigmoid). Files of EXAONE MoE, Ernie 4.5, Hy V3
and MiniMax-M2 name some tensors otherwise than transformers' model: adapters have the model's names, an export the
files'. vLLM is given merged weights of these four, under the files' names; it was not run with any of the five.
MiniMax-M2 is read in bfloat16, not in FP8. transformers rotates the part of its heads that
`partial_rotary_factor` names; files whose `rotary_dim` is another are refused.

Gemma 4, text alone and with a tower, is refused. Its small models need per-layer embeddings and layers that take keys
and values of an earlier one; all need heads of two sizes and a norm on values; its mixture needs experts beside the MLP
of a layer. Falcon-H1 needs Mamba and attention side by side in a layer, with a factor on each branch. DeepSeek-V4 needs
hyper-connections, attention over compressed keys and routing by token; GLM-5 (`glm_moe_dsa`) the indexer of sparse
attention. Ling (`bailing_moe_v2`) has no class in transformers: megatron-bridge brings one, which nothing here reads.
Llama 4 is refused since megatron-bridge 0.6.2 maps no such family.

| model_type | class in transformers | state | log-probability | there and back | tried |
|---|---|---|---|---|---|
"""
# Of a reason on the page.
MOST_CHARACTERS = 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = [*(family for family in families() if family not in WITH_TOWER), *WITH_TOWER]
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(everyone))
    wanted: list[str] = parser.parse_args().families
    unknown = set(wanted) - set(everyone)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: wanted some of {', '.join(everyone)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = _written_rows() if wanted else {}
    commit, date = _commit(), datetime.now(UTC).date()
    for family in wanted or everyone:
        tried = f"`python -m tools.models_page {family}`, `{commit}`, {date}"
        rows[family] = f"| `{family}` | {' | '.join(_cells(family))} | {tried} |"
    bridge, core, hf = (version(name) for name in ("megatron-bridge", "megatron-core", "transformers"))
    heading = HEADING.format(bridge=bridge, core=core, hf=hf)
    PAGE.write_text(heading + "\n".join(rows[family] for family in everyone if family in rows) + "\n")


def _written_rows() -> dict[str, str]:
    """The rows of the page as it is, by family."""
    return {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


def _commit() -> str:
    """The commit that is tried, and whether files that git tracks differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{PAGE.relative_to(ROOT)}")
    return f"{commit} and changes" if changed else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cells(family: str) -> tuple[str, ...]:
    """Class, state, and what was found."""
    with tempfile.TemporaryDirectory() as name:
        if family in WITH_TOWER:
            model = _build_seeing(family)
            return f"`{type(model).__name__}`", *_try(model, Path(name))
        architecture, reason = f"`{families()[family]['architecture']}`", unknown_reason(family)
        if reason is not None:
            return architecture, f"refused{_short(reason)}", "", ""
        attempt = _try if family in MEGATRON_FAMILIES else _try_files
        return architecture, *attempt(_build(family), Path(name))


def _short(reason: str) -> str:
    return reason if len(reason) <= MOST_CHARACTERS else f"{reason[: MOST_CHARACTERS - 4]} ..."


def _try(model: Any, folder: Path) -> tuple[str, str, str]:
    """(state, largest difference of a log-probability, whether there and back is bit for bit)."""
    try:
        reference = _save(model, folder / "hf")
        same = _there_and_back(folder)
        return "trains", f"{_largest_difference(folder / 'hf', reference):.1e}", "same bits" if same else "differs"
    except (UserError, RuntimeError, AssertionError) as error:
        return f"fails: {_short(str(error).splitlines()[0])}", "", ""


def _try_files(model: Any, folder: Path) -> tuple[str, str, str]:
    """`_try` of a family that Megatron-Core's layers were not compared for: its files alone."""
    try:
        _save(model, folder / "hf")
        return "not verified", "", "same bits" if _there_and_back(folder) else "differs"
    except UserError as error:
        return f"not verified ({_short(str(error).replace(f'{folder}/hf', 'its folder'))})", "", ""


def _build(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    config = kind(**_sizes(kind))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)


def _build_seeing(family: str) -> Any:
    """A vision-language model."""
    text = type(CONFIG_MAPPING[family]().text_config)
    config = tower_config(family, _sizes(text), tied=False)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager", trust_remote_code=False)


def _sizes(kind: Any) -> dict[str, Any]:
    """The sizes that a config's class has."""
    declared = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in declared}
    if "linear_num_key_heads" not in declared:
        sizes.pop("layer_types", None)
    if "kv_lora_rank" in declared:
        # Latent attention: the head's size is the sum of two others, and each head has keys of its own.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _save(model: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def _there_and_back(folder: Path) -> bool:
    checkpoint, again = folder / "megatron", folder / "again"
    convert_hf_to_megatron(hf_model_name=str(folder / "hf"), megatron_ckpt_path=str(checkpoint), show_progress=False)
    convert_megatron_to_hf(megatron_ckpt_path=str(checkpoint), hf_ckpt_path=str(again), show_progress=False)
    first, second = SafetensorsFolder(folder / "hf"), SafetensorsFolder(again)
    return first.entries.keys() == second.entries.keys() and all(
        tensor_bytes(first.read(name)) == tensor_bytes(second.read(name)) for name in first.entries
    )


def _largest_difference(folder: Path, reference: Any) -> float:
    config = PolicyConfig.model_validate(
        {
            "model_name": str(folder),
            "precision": "float32",
            "max_total_sequence_length": 64,
            "megatron_cfg": {"enabled": True, "peft": {"enabled": True, "dim": 4, "alpha": 8}},
        }
    )
    check_base(config, read_base(config))
    world = init_megatron_world(config, seed=0)
    from megatron_lora.policy.megatron.policy import MegatronPolicy

    policy = MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=1)
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 17, 30)
    ids = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator) for length in lengths]
    rows = [Row(row, torch.ones(len(row), dtype=torch.bool), number) for number, row in enumerate(ids)]
    found = policy.score(rows)
    worst = 0.0
    for row, logps in zip(ids, found, strict=True):
        with torch.no_grad():
            logits = reference(row[None]).logits[0, :-1]
        wanted = logits.log_softmax(-1).gather(1, row[1:, None]).squeeze(1)
        worst = max(worst, float((logps[1:] - wanted).abs().max()))
    return worst


if __name__ == "__main__":
    main()
