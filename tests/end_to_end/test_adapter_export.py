"""The conversion tools from the outside: files in, files out, judged by transformers and peft."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lora.checksums import seal
from megatron_lora.conversion.adapter_checkpoint import write_adapter
from megatron_lora.conversion.export import export_lora_adapter_to_hf, import_hf_adapter, merge_lora_to_hf
from megatron_lora.conversion.fingerprint import fingerprint_base
from megatron_lora.conversion.model_names import hf_shape, model_parameters
from megatron_lora.conversion.safetensors_io import write_tensors
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe, describe_config
from megatron_lora.lora.layout import AdapterSpec, ModelSpec, build_layout, module_name
from megatron_lora.lora.model_spec import ModelSizes

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(3, 35)[None]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_base(folder: Path, family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=101,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer_config.json").write_text('{"made": "up"}')
    return folder


def write_step(folder: Path, base: Path, output_layer: bool = False) -> Path:
    """A step folder with a fused adapter (one shared A each) on every linear, as a run on `base` writes it."""
    shapes = describe_config(json.loads((base / "config.json").read_text()))
    names = [module_name(kind, layer) for layer in range(3) for kind in shapes.kinds[:-1]]
    names += ["output_layer"] if output_layer else []
    modules = [build_layout(name, 4, 6, shapes) for name in names]
    spec = AdapterSpec(str(base), shapes, modules, fingerprint_base(base), {"dropout": 0.0})
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in spec.factor_shapes().items()}
    write_adapter(folder / "policy" / "weights", spec, tensors)
    return folder


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits[0]


FAMILIES = [("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", True), ("qwen3", False), ("gemma2", True)]


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_both_modes_give_one_model(family, tied, tmp_path):
    base = write_base(tmp_path / "base", family, tied)
    step = write_step(tmp_path / "step_1", base, output_layer=not tied)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    export_lora_adapter_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(adapter), check_logits=True)
    merge_lora_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(merged), check_logits=True, show_progress=False)

    model, loading = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    with_adapter = logits(PeftModel.from_pretrained(load(base), adapter))
    torch.testing.assert_close(logits(model.eval()), with_adapter, atol=1e-4, rtol=1e-4)
    assert (with_adapter - logits(load(base))).abs().max() > 0.1, "the adapter must show"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == LINEARS + ([] if tied else ["lm_head"])
    assert config["base_model_name_or_path"] == str(base)
    assert (merged / "model.safetensors.index.json").is_file()
    assert json.loads((merged / "generation_config.json").read_text())["top_k"] == 7
    assert (merged / "tokenizer_config.json").read_text() == '{"made": "up"}'


def test_a_merge_in_bf16_reports_what_rounding_costs(tmp_path, caplog):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    step = write_step(tmp_path / "step_1", base)
    with caplog.at_level("INFO", logger="megatron_lora.conversion"):
        merge_lora_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(tmp_path / "merged"), show_progress=False)
    lost = [float(number) for number in re.findall(r"([\d.]+)%", caplog.text)]
    assert len(lost) == 2 and 0 < lost[0] <= lost[1] < 5, caplog.text

    wide = tmp_path / "wide"
    merge_lora_to_hf(adapter_ckpt=str(step), hf_ckpt_path=str(wide), dtype="float32", show_progress=False)
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    weights = {name: tensor for path in wide.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    name = "model.layers.1.self_attn.k_proj.weight"
    before = load(base).state_dict()[name]
    rounded = {n: t for path in (tmp_path / "merged").glob("*.safetensors") for n, t in load_file(path).items()}[name]
    delta = weights[name] - before
    assert rounded.dtype == torch.bfloat16
    error = float((rounded.float() - before - delta).norm() / delta.norm())
    assert 0 < error < lost[1] / 100 + 1e-4


def test_any_hf_adapter_goes_in_and_comes_out_bit_for_bit(tmp_path):
    base = write_base(tmp_path / "base", "qwen3")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={"v_proj": 3},
        alpha_pattern={"layers.1.*up_proj": 5},
        layers_to_transform=[0, 1],
    )
    model = get_peft_model(load(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    expected = logits(model)

    names = {"hf_model_name": str(base)}
    import_hf_adapter(hf_adapter=str(tmp_path / "hf"), adapter_ckpt_path=str(tmp_path / "step"), **names)
    for folder, uniform in (("again", False), ("uniform", True)):
        out = tmp_path / folder
        export_lora_adapter_to_hf(adapter_ckpt=str(tmp_path / "step"), hf_ckpt_path=str(out), uniform_scale=uniform)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), out)), expected, atol=1e-5, rtol=1e-4)
    before = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    merge_lora_to_hf(
        adapter_ckpt=str(tmp_path / "step"),
        hf_ckpt_path=str(tmp_path / "merged"),
        check_logits=True,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ready")
    base = write_base(folder / "base")
    return base, write_step(folder / "step_1", base)


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"conversion/{name}.py", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def test_the_tools_run_from_the_command_line(ready, tmp_path):
    base, step = ready
    result = run_tool(
        *("convert_lora_to_hf", "--base-ckpt", base, "--lora-ckpt", step, "--hf-model-name", "some/name"),
        *("--hf-ckpt-path", tmp_path / "a", "--adapter-only"),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/name"
    result = run_tool(
        *("import_hf_adapter", "--hf-adapter", tmp_path / "a", "--hf-model-name", base),
        *("--adapter-ckpt-path", tmp_path / "step"),
    )
    assert result.returncode == 0, result.stderr
    result = run_tool(
        *("convert_lora_to_hf", "--mode", "merged", "--adapter-ckpt", tmp_path / "step"),
        *("--hf-ckpt-path", tmp_path / "m", "--base-ckpt", base),
    )
    assert result.returncode == 0, result.stderr
    assert "merging" in result.stdout and "rounding cost" in result.stderr and "WARNING" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m", "step"]


def test_a_mistake_ends_with_status_2_and_one_message(ready, tmp_path):
    _, step = ready
    arguments = ("--mode", "adapter", "--adapter-ckpt", step, "--hf-ckpt-path", tmp_path)
    result = run_tool("convert_lora_to_hf", *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "exists already" in result.stderr
    assert "Traceback" in run_tool("convert_lora_to_hf", *arguments, "--debug").stderr


def cut_base(base: Path, step: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(base, folder / "cut")
    shard = next((folder / "cut").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 8)
    return {"base_ckpt": folder / "cut"}


def empty_base(base: Path, step: Path, folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return {"base_ckpt": folder / "empty"}


def sealed_step(step: Path, folder: Path) -> Path:
    """A copy with checksums, as a run leaves it."""
    shutil.copytree(step, folder / "sealed")
    seal(folder / "sealed")
    return folder / "sealed"


def flipped_bit(base: Path, step: Path, folder: Path) -> dict[str, Any]:
    sealed = sealed_step(step, folder)
    path = max(sealed.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return {"adapter_ckpt": sealed}


def edited_scale(base: Path, step: Path, folder: Path) -> dict[str, Any]:
    sealed = sealed_step(step, folder)
    path = next(sealed.rglob("adapter.json"))
    path.write_text(path.read_text().replace('"alpha": 6', '"alpha": 12'))
    return {"adapter_ckpt": sealed}


def lost_file(base: Path, step: Path, folder: Path) -> dict[str, Any]:
    sealed = sealed_step(step, folder)
    next(sealed.rglob("*.distcp")).unlink()
    return {"adapter_ckpt": sealed}


# What is planted (from base, step and an empty folder: the arguments), and what is printed.
EXPORT_FAULTS: dict[str, tuple[Callable[[Path, Path, Path], dict[str, Any]], str]] = {
    "a base of another family": (
        lambda base, step, folder: {"base_ckpt": write_base(folder / "other", "qwen2")},
        "model_type=qwen2 .llama.",
    ),
    "a base that is cut short": (cut_base, "is truncated"),
    "a base without files": (empty_base, "is neither a Hugging Face folder"),
    "a base that is nowhere": (
        lambda base, step, folder: {"hf_model_name": "no-one/no-such-model"},
        "no-one/no-such-model is neither a folder",
    ),
    "a dtype that nobody has": (lambda base, step, folder: {"dtype": "int4"}, "dtype='int4'.*not 4 bits"),
    "a folder without a checkpoint": (
        lambda base, step, folder: {"adapter_ckpt": base},
        "adapter.json",
    ),
    "a bit of the weights": (flipped_bit, "a file of it is damaged"),
    "an edited scale": (edited_scale, "adapter.json has another content"),
    "a lost file": (lost_file, "lacks its shard"),
}


@pytest.mark.parametrize("fault", EXPORT_FAULTS)
def test_a_planted_fault_is_told_and_nothing_is_left(fault, ready, tmp_path, monkeypatch):
    base, step = ready
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plant, message = EXPORT_FAULTS[fault]
    arguments = {"adapter_ckpt": step} | plant(base, step, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as told:
        merge_lora_to_hf(hf_ckpt_path=str(tmp_path / "out"), **{name: str(value) for name, value in arguments.items()})
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.iterdir()) == before


def test_another_base_of_the_same_shape_is_warned_of(ready, tmp_path, caplog):
    base, step = ready
    model = load(base)
    model.lm_head.weight.data.add_(1.0)
    model.save_pretrained(tmp_path / "tuned")
    out = str(tmp_path / "out")
    merge_lora_to_hf(adapter_ckpt=str(step), hf_ckpt_path=out, base_ckpt=str(tmp_path / "tuned"), show_progress=False)
    assert "are not those that the adapter was trained on" in caplog.text


def test_nan_in_the_adapter_is_refused(ready, tmp_path):
    base, _ = ready
    shapes = describe_config(json.loads((base / "config.json").read_text()))
    spec = AdapterSpec(str(base), shapes, [build_layout("decoder.layers.2.mlp.linear_fc2", 2, 4, shapes)])
    tensors = {name: torch.full(shape, float("nan")) for name, shape in spec.factor_shapes().items()}
    write_adapter(tmp_path / "step" / "policy" / "weights", spec, tensors)
    step, out = str(tmp_path / "step"), str(tmp_path / "out")
    with pytest.raises(UserError, match="layers.2.mlp.down_proj.lora_A.weight holds NaN"):
        export_lora_adapter_to_hf(adapter_ckpt=step, hf_ckpt_path=out)
    with pytest.raises(UserError, match="merged model.layers.2.mlp.down_proj.weight is not finite"):
        merge_lora_to_hf(adapter_ckpt=step, hf_ckpt_path=out, show_progress=False)
    assert not Path(out).exists()


MEASURE = """
import json, sys, time
import accelerate
from transformers import LlamaForCausalLM
from megatron_lora.conversion import export
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
before, start = kib("VmRSS"), time.perf_counter()
getattr(export, sys.argv[1])(**json.loads(sys.argv[2]))
print(json.dumps({"bytes": (kib("VmHWM") - before) * 1024, "seconds": time.perf_counter() - start,
                  "bridge": "megatron.bridge" in sys.modules}))
"""


def measure(function: str, **arguments: object) -> dict:
    """Peak memory over what importing takes, and time, of one call in a process of its own."""
    command = [sys.executable, "-c", MEASURE, function, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def write_plain_adapter(step: Path, name: str, shapes: ModelSpec) -> int:
    """A rank-8 bf16 adapter on every linear of the layers; returns its bytes."""
    names = [module_name(kind, layer) for layer in range(shapes.num_layers) for kind in shapes.kinds[:-1]]
    spec = AdapterSpec(name, shapes, [build_layout(name, 8, 16, shapes) for name in names])
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in spec.factor_shapes().items()}
    write_adapter(step / "policy" / "weights", spec, tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_a_70b_shape_is_exported_in_seconds_and_little_memory(tmp_path):
    shapes = describe(ModelSizes("llama", 8192, 28672, 80, 64, 8, 128, 128256, False))
    size = write_plain_adapter(tmp_path / "step", "meta-llama/Llama-3.1-70B", shapes)
    measured = measure(
        "export_lora_adapter_to_hf", adapter_ckpt=str(tmp_path / "step"), hf_ckpt_path=str(tmp_path / "out")
    )
    print({**measured, "adapter_bytes": size})
    assert measured["bytes"] < 4 * size and measured["seconds"] < 60 and not measured["bridge"]


def test_a_merge_holds_a_tensor_or_two_and_not_the_model(tmp_path):
    shapes = describe(ModelSizes("llama", 2048, 4096, 8, 16, 4, 128, 1000, False))
    write_plain_adapter(tmp_path / "step", str(tmp_path / "base"), shapes)
    (tmp_path / "base").mkdir()
    config = AutoConfig.for_model(
        "llama",
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=1000,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path / "base")
    described = {
        name: (torch.bfloat16, hf_shape(parameter, name, shapes))
        for parameter in model_parameters(shapes)
        for name in parameter.hf_names
    }
    zeros = ((name, torch.zeros(shape, dtype=dtype)) for name, (dtype, shape) in described.items())
    size = write_tensors(tmp_path / "base" / "model.safetensors", described, zeros)
    measured = measure(
        "merge_lora_to_hf", adapter_ckpt=str(tmp_path / "step"), hf_ckpt_path=str(tmp_path / "out"), show_progress=False
    )
    print({**measured, "model_bytes": size})
    assert measured["bytes"] < size / 3
