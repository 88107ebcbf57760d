"""Whole-model conversion from the outside, and every mistake of the conversion tools from the command line."""

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.command_line import run
from megatron_lora.conversion.export import export_lora_adapter_to_hf, merge_lora_to_hf
from megatron_lora.conversion.megatron_weights import MegatronWeights
from megatron_lora.conversion.torch_dist import TorchDistFolder
from megatron_lora.conversion.whole_model import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.policy.dtensor.checkpoint import save_model
from tests.end_to_end.test_adapter_export import load, write_base, write_step

ROOT = Path(__file__).parents[2]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def to_megatron(base: Path, out: Path, **options: object) -> Path:
    return Path(
        convert_hf_to_megatron(hf_model_name=str(base), megatron_ckpt_path=str(out), show_progress=False, **options)  # type: ignore[arg-type]
    )


def to_hf(checkpoint: Path, out: Path, **options: object) -> Path:
    return Path(
        convert_megatron_to_hf(
            megatron_ckpt_path=str(checkpoint),
            hf_ckpt_path=str(out),
            show_progress=False,
            **options,  # type: ignore[arg-type]
        )
    )


def assert_same_tensors(left: Path, right: Path) -> None:
    a, b = tensors_of(left), tensors_of(right)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def test_bf16_shards_and_small_files_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "qwen2", tied=True, dtype=torch.bfloat16)
    megatron = to_megatron(base, tmp_path / "megatron", tp=2, pp=3)
    assert json.loads((megatron / "source.json").read_text())["hf_model_name"] == str(base)
    monkeypatch.setattr("megatron_lora.conversion.megatron_weights.MAX_SHARD_BYTES", 20_000)
    out = to_hf(megatron, tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert_same_tensors(base, out)
    names = {path.name for path in base.iterdir() if not path.name.startswith("model")}
    assert {path.name for path in out.iterdir() if not path.name.startswith("model")} == names
    for name in names:
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_step_folder_needs_only_its_recipe(tmp_path: Path) -> None:
    """What a run of full fine-tuning writes: no `hf` folder, a recipe that names the model, its tokenizer."""
    base = write_base(tmp_path / "base", "qwen3")
    step = to_megatron(base, tmp_path / "step_7")
    shutil.rmtree(step / "hf")
    with pytest.raises(UserError, match="does not say which model it is; name it with --hf-model-name"):
        to_hf(step, tmp_path / "out")
    (step / "config.yaml").write_text(f"policy:\n  model_name: {base}\n")
    (step / "policy" / "tokenizer").mkdir()
    (step / "policy" / "tokenizer" / "tokenizer_config.json").write_text('{"of": "the run"}')
    out = to_hf(step, tmp_path / "out")
    assert_same_tensors(base, out)
    assert (out / "tokenizer_config.json").read_text() == '{"of": "the run"}'


def test_the_other_backends_checkpoint_is_converted_too(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gemma2", tied=True)
    save_model(dict(load(base).named_parameters()), tmp_path / "step_1" / "policy" / "weights")
    assert_same_tensors(base, to_hf(tmp_path / "step_1", tmp_path / "out", hf_model_name=str(base)))


def test_training_in_another_dtype_shows_in_the_config(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    wide = write_base(tmp_path / "wide", dtype=torch.float32)
    out = to_hf(
        shutil.copytree(to_megatron(wide, tmp_path / "m") / "policy", tmp_path / "step" / "policy").parent,
        tmp_path / "out",
        hf_model_name=str(base),
    )
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert_same_tensors(wide, out)


def test_a_tied_head_stored_a_second_time_is_left_out(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen2", tied=True)
    shard = sorted(base.glob("*.safetensors"))[0]
    head = tensors_of(base)["model.embed_tokens.weight"]
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for tensor, message in ((head.clone(), None), (head + 1, "ties lm_head.weight to model.embed_tokens.weight, but")):
        save_file(load_file(shard) | {"lm_head.weight": tensor}, shard)
        index["weight_map"]["lm_head.weight"] = shard.name
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        if message:
            with pytest.raises(UserError, match=message):
                to_megatron(base, tmp_path / "again")
        else:
            out = to_hf(to_megatron(base, tmp_path / "m"), tmp_path / "out")
            assert "lm_head.weight" not in tensors_of(out)
    assert not (tmp_path / "again").exists()


def test_the_self_check_finds_a_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    read = TorchDistFolder.read

    def damaged(self: TorchDistFolder, names: list[str]) -> dict[str, torch.Tensor]:
        tensors = read(self, names)
        if "decoder.layers.1.mlp.linear_fc1.weight" in tensors:
            tensors["decoder.layers.1.mlp.linear_fc1.weight"].view(torch.int32)[-1, -1] ^= 1
        return tensors

    monkeypatch.setattr(TorchDistFolder, "read", damaged)
    with pytest.raises(RuntimeError, match="self-check failed: model.layers.1.mlp.up_proj.weight"):
        to_megatron(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused tensor is read from the checkpoint once for all HF tensors in it."""
    base = write_base(tmp_path / "base", "qwen2", tied=True)
    megatron = to_megatron(base, tmp_path / "m")
    reads: list[str] = []
    read = TorchDistFolder.read

    def counting(self: TorchDistFolder, names: list[str]) -> dict[str, torch.Tensor]:
        reads.extend(names)
        assert len(list(names)) == 1
        return read(self, names)

    monkeypatch.setattr(TorchDistFolder, "read", counting)
    shapes = AdapterSpec.load(write_step(tmp_path / "s", base) / "policy" / "weights" / "adapter.json").shapes
    weights = MegatronWeights(megatron / "policy" / "weights", shapes)
    for names in weights.shards.values():
        for name in names:
            weights.read(name)
    assert len(reads) == len(set(reads)) == 2 + 3 * 7


def start_tool(name: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, f"conversion/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def test_the_tools_convert_from_the_command_line(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    status, errors = finish(
        start_tool(
            "convert_hf_to_megatron",
            *("--hf-model-name", base, "--megatron-ckpt-path", tmp_path / "m", "--tp", 2, "--pp", 3),
        )
    )
    assert status == 0, errors
    status, errors = finish(
        start_tool("convert_megatron_to_hf", "--megatron-ckpt-path", tmp_path / "m", "--hf-ckpt-path", tmp_path / "out")
    )
    assert status == 0, errors
    assert_same_tensors(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m", "out"]


class Mistakes:
    """Commands that must end with exit status 2 and one line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = write_base(folder / "base")
        self.other = write_base(folder / "other", "qwen2")
        self.step = write_step(folder / "step_1", self.base)
        self.model = to_megatron(self.base, folder / "model")
        self.cases: list[tuple[str, tuple[object, ...], str]] = []

    def copy(self, source: Path, name: str, change: Callable[[Path], None]) -> Path:
        target = shutil.copytree(source, self.folder / name)
        change(target)
        return target

    def adapter(self, message: str, *arguments: object, step: Path | None = None, out: str = "out") -> None:
        common = ("--adapter-ckpt", step or self.step, "--hf-ckpt-path", self.folder / out)
        self.cases.append(("convert_lora_to_hf", (*common, *arguments), message))

    def whole(self, message: str, name: str, *arguments: object) -> None:
        self.cases.append((name, arguments, message))


def cut(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = max(folder.rglob(pattern), key=lambda path: path.stat().st_size)
        path.write_bytes(path.read_bytes()[:-40])

    return change


def damage_header(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", 1 << 40))


def edit_spec(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.rglob("adapter.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def all_mistakes(folder: Path) -> Mistakes:
    m = Mistakes(folder)
    out = ("--hf-ckpt-path", folder / "out")
    m.adapter("exists already; nothing is overwritten", "--mode", "adapter", out="base")
    m.adapter("is not a folder", step=folder / "nowhere")
    m.adapter("holds no policy/weights/adapter.json", step=m.base)
    m.adapter("holds full weights and no adapter.json", step=m.model)
    lacking = m.copy(m.step, "lacking", lambda path: next(path.rglob("*.distcp")).unlink())
    m.adapter("lacks its shard __0_0.distcp", "--mode", "adapter", step=lacking)
    m.adapter("is truncated", "--mode", "adapter", step=m.copy(m.step, "short", cut("*.distcp")))
    m.adapter("the adapter is for another base", "--base-ckpt", m.other)
    m.adapter("type 'moe'", "--mode", "adapter", step=m.copy(m.step, "moe", edit_spec(type="moe")))
    m.adapter("is truncated", "--base-ckpt", m.copy(m.base, "short_base", cut("*.safetensors")))
    m.adapter("is truncated or no safetensors file", "--base-ckpt", m.copy(m.base, "no_header", damage_header))
    m.adapter("cannot be written", out="base/config.json/out")
    m.whole("neither a folder here nor", "convert_hf_to_megatron", "--hf-model-name", "no/such", *to(folder))
    m.whole("does not divide the model's 2 query groups", "convert_hf_to_megatron", *of(m.base), *to(folder), "--tp", 4)
    m.whole("above the model's 3 layers", "convert_hf_to_megatron", *of(m.base), *to(folder), "--pp", 4)
    m.whole("holds an adapter", "convert_megatron_to_hf", "--megatron-ckpt-path", m.step, *out)
    short = m.copy(m.model, "short_model", cut("*.distcp"))
    m.whole("is truncated", "convert_megatron_to_hf", "--megatron-ckpt-path", short, *out)
    m.whole("holds no policy/weights/.metadata", "convert_megatron_to_hf", "--megatron-ckpt-path", m.base, *out)
    import_to = ("--adapter-ckpt-path", folder / "out", "--hf-model-name", m.base)
    m.whole("is no HF PEFT adapter folder", "import_hf_adapter", "--hf-adapter", m.base, *import_to)
    export_lora_adapter_to_hf(adapter_ckpt=str(m.step), hf_ckpt_path=str(folder / "hf"))
    dora = m.copy(folder / "hf", "dora", use_dora)
    m.whole("lora_magnitude_vector", "import_hf_adapter", "--hf-adapter", dora, *import_to)
    short_adapter = m.copy(folder / "hf", "short_adapter", cut("*.safetensors"))
    m.whole("is truncated", "import_hf_adapter", "--hf-adapter", short_adapter, *import_to)
    olmo = write_base(folder / "olmo2", "olmo2", True)
    m.whole("is not a family whose linears are known", "convert_hf_to_megatron", "--hf-model-name", olmo, *to(folder))
    return m


def of(base: Path) -> tuple[object, ...]:
    return ("--hf-model-name", base)


def to(folder: Path) -> tuple[object, ...]:
    return ("--megatron-ckpt-path", folder / "out")


def use_dora(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))


def in_this_process(name: str, arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    tool = importlib.import_module(f"conversion.{name}")
    status = run(tool.main, tool.parse_args([str(argument) for argument in arguments]))
    return status, capsys.readouterr().err


def test_every_mistake_is_one_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tool's first mistake in a process of its own, which takes seconds to start; the others here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mistakes = all_mistakes(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    wrong, started = [], set()
    for name, arguments, message in mistakes.cases:
        if name in started:
            status, errors = in_this_process(name, arguments, capsys)
        else:
            started.add(name)
            status, errors = finish(start_tool(name, *arguments))
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        if status != 2 or len(lines) != 1 or message not in lines[0] or "Traceback" in errors:
            wrong.append((message, status, errors[-500:]))
    assert not wrong
    assert started == {
        "convert_lora_to_hf",
        "convert_hf_to_megatron",
        "convert_megatron_to_hf",
        "import_hf_adapter",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the kernel refuses the write."""
    base = write_base(tmp_path / "base")
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv = sys.argv[1:]; "
    limited += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = ["--hf-model-name", base, "--megatron-ckpt-path", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-c", limited, "conversion/convert_hf_to_megatron.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "no space left" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_merging_warns_where_a_megatron_base_is_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_base(tmp_path / "base")
    step = write_step(tmp_path / "step_1", base)
    changed = shutil.copytree(base, tmp_path / "changed")
    shard = sorted(changed.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    megatron = to_megatron(changed, tmp_path / "m")
    merge_lora_to_hf(
        adapter_ckpt=str(step), hf_ckpt_path=str(tmp_path / "out"), base_ckpt=str(megatron), show_progress=False
    )
    assert "are not those that the adapter was trained on" in caplog.text
