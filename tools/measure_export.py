"""Memory and time of the exports beside peft's `merge_and_unload`, on one random model: prints a Markdown table.

python -m tools.measure_export [--folder DIR]

Each row runs in a process of its own. Memory is the process's peak (VmHWM) above what it held after importing; it
counts pages of files that are mapped, not those that the system caches.
"""

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import torch

from megatron_lora.conversion.adapter_checkpoint import write_adapter
from megatron_lora.conversion.model_names import hf_shape, model_parameters
from megatron_lora.conversion.safetensors_io import write_tensors
from megatron_lora.lora.describe import describe_config
from megatron_lora.lora.layout import AdapterSpec, build_layout, module_name

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 64000,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
RANK, ALPHA = 32, 32

MEASURED = """
import json, sys, time
import torch
{imports}
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
before, start = kib("VmRSS"), time.perf_counter()
folder = sys.argv[1]
{work}
print(json.dumps([(kib("VmHWM") - before) / 2**20, time.perf_counter() - start]))
"""
# name -> (imports, work)
ROWS = {
    "`--mode adapter`": (
        "from megatron_lora.conversion.export import export_lora_adapter_to_hf",
        'export_lora_adapter_to_hf(adapter_ckpt=f"{folder}/step", hf_ckpt_path=f"{folder}/adapter")',
    ),
    "`--mode merged`": (
        "from megatron_lora.conversion.export import merge_lora_to_hf",
        'merge_lora_to_hf(adapter_ckpt=f"{folder}/step", hf_ckpt_path=f"{folder}/merged", show_progress=False)',
    ),
    "peft `merge_and_unload`": (
        "from peft import PeftModel; from transformers import LlamaForCausalLM",
        'base = LlamaForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)\n'
        'PeftModel.from_pretrained(base, f"{folder}/adapter").merge_and_unload().save_pretrained(f"{folder}/peft")',
    ),
    "`convert_hf_to_megatron.py`": (
        "from megatron_lora.conversion.whole_model import convert_hf_to_megatron",
        'convert_hf_to_megatron(hf_model_name=f"{folder}/base", megatron_ckpt_path=f"{folder}/megatron",'
        " show_progress=False)",
    ),
    "`convert_megatron_to_hf.py`": (
        "from megatron_lora.conversion.whole_model import convert_megatron_to_hf",
        'convert_megatron_to_hf(megatron_ckpt_path=f"{folder}/megatron", hf_ckpt_path=f"{folder}/back",'
        " show_progress=False)",
    ),
}


def build(folder: Path) -> tuple[int, int]:
    """A base and an adapter checkpoint on all linears, both bf16; returns their bytes."""
    shapes = describe_config(CONFIG)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(CONFIG))
    described = {
        name: (torch.bfloat16, hf_shape(parameter, name, shapes))
        for parameter in model_parameters(shapes)
        for name in parameter.hf_names
    }
    torch.manual_seed(0)
    tensors = ((name, torch.randn(shape, dtype=dtype) * 0.02) for name, (dtype, shape) in described.items())
    base_bytes = write_tensors(folder / "base" / "model.safetensors", described, tensors)
    names = [module_name(kind, layer) for layer in range(shapes.num_layers) for kind in shapes.kinds[:-1]]
    modules = [build_layout(name, RANK, ALPHA, shapes) for name in names]
    spec = AdapterSpec(str(folder / "base"), shapes, modules)
    factors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in spec.factor_shapes().items()}
    write_adapter(folder / "step" / "policy" / "weights", spec, factors)
    return base_bytes, sum(tensor.numel() * 2 for tensor in factors.values())


def measure(folder: Path, imports: str, work: str) -> tuple[float, float]:
    """(GiB, seconds) of one row."""
    script = MEASURED.format(imports=imports, work=work)
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-3000:])
    gib, seconds = json.loads(result.stdout.splitlines()[-1])
    return gib, seconds


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to build; about four times the model; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        base_bytes, adapter_bytes = build(Path(name))
        print(f"Base {base_bytes / 2**30:.2f} GiB, adapter {adapter_bytes / 2**30:.3f} GiB (rank {RANK}), bf16.\n")
        print("| tool | peak memory, GiB | seconds |\n|---|---|---|")
        for row, (imports, work) in ROWS.items():
            gib, seconds = measure(Path(name), imports, work)
            print(f"| {row} | {gib:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
