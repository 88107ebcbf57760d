"""Adapter-only distributed checkpoints: the factors and `adapter.json`, read and written in one process."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_lora.conversion.safetensors_io import read_header, read_tensor, write_tensor_dict
from megatron_lora.conversion.torch_dist import StoredTensor, TorchDistFolder, write_torch_dist
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec
from megatron_lora.lora.peft_format import check_tensors
from megatron_lora.lora.principal import STARTED, against_the_base

# The A and B that the base of an adapter of its residual lacks (`AdapterSpec.residual`), whole, by `<module>.<factor>`.
START_FILE = "start.safetensors"

_IN_A_STEP = f"policy/weights/{ADAPTER_FILE}"


def weights_folder(checkpoint: Path | str) -> Path:
    """The folder with the weights: of a step folder, of its `policy`, or the weights folder itself.

    Raises UserError where there is none, or it holds no adapter.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"adapter checkpoint {checkpoint} is not a folder; give a run's step_N folder")
    for folder in (checkpoint / "policy" / "weights", checkpoint / "weights", checkpoint):
        if (folder / ADAPTER_FILE).is_file():
            return folder
    if (checkpoint / "policy" / "weights" / ".metadata").is_file():
        raise UserError(
            f"{checkpoint} holds full weights and no {ADAPTER_FILE}: it is of full fine-tuning, not of an adapter; "
            "use convert_megatron_to_hf.py"
        )
    # The run's folder, or what lies beside the weights in the step's.
    meant = [step for step in (*newest_steps(checkpoint), checkpoint.parent) if (step / _IN_A_STEP).is_file()]
    advice = f"did you mean {meant[0]}?" if meant else "give a complete step_N folder of a LoRA run"
    raise UserError(f"{checkpoint} holds no {_IN_A_STEP}; {advice}")


def newest_steps(run: Path) -> list[Path]:
    """The `step_N` folders of a run, the newest first."""
    steps = [path for path in run.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(steps, key=lambda path: -int(path.name.removeprefix("step_")))


def read_adapter(checkpoint: Path | str) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """(spec, `<module>.<factor>` -> full CPU tensor) whatever layout wrote it.

    Holds the adapter once. Raises UserError for missing or truncated files and tensors that the spec does not name.
    """
    folder = weights_folder(checkpoint)
    spec = AdapterSpec.load(folder / ADAPTER_FILE)
    stored = TorchDistFolder(folder)
    wanted = spec.factor_shapes()
    missing, unexpected = sorted(set(wanted) - set(stored.tensors)), sorted(set(stored.tensors) - set(wanted))
    if missing or unexpected:
        raise UserError(
            f"{folder} does not hold the tensors that its {ADAPTER_FILE} names: missing {missing[:3] or 'none'}, "
            f"unexpected {unexpected[:3] or 'none'}; the checkpoint is incomplete or of another adapter"
        )
    tensors = stored.read(list(wanted))
    for name in tensors:
        padded = name.startswith("output_layer.") or name in spec.saved
        if padded and tensors[name].shape[0] > wanted[name][0]:
            # Written with the vocabulary padding of its tensor-parallel layout.
            tensors[name] = tensors[name][: wanted[name][0]].clone()
    check_tensors(spec, tensors)
    return spec, {name: tensors[name] for name in wanted}


def write_adapter(folder: Path | str, spec: AdapterSpec, tensors: dict[str, Tensor]) -> None:
    """Write what Megatron-Core's `dist_checkpointing.load` and `read_adapter` read, into the empty folder."""
    check_tensors(spec, tensors)
    folder = Path(folder)
    entries = {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_torch_dist(folder, entries, tensors.__getitem__)
    spec.save(folder / ADAPTER_FILE)


def read_plain_adapter(checkpoint: Path | str) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """`read_adapter`, as an adapter of the base itself whatever the run trained against. Raises UserError."""
    spec, tensors = read_adapter(checkpoint)
    if not spec.residual:
        return spec, tensors
    return against_the_base(spec, tensors, read_start(weights_folder(checkpoint), spec))


def write_start(folder: Path, start: Mapping[str, Tensor]) -> None:
    """Beside the weights in `folder`, whole or not at all."""
    partial = folder / f"{START_FILE}.partial"
    write_tensor_dict(partial, {name: value.contiguous() for name, value in start.items()})
    partial.replace(folder / START_FILE)


def read_start(folder: Path, spec: AdapterSpec) -> dict[str, Tensor]:
    """What `write_start` wrote for this adapter. Raises UserError where the file is missing or of another adapter."""
    entries, _ = read_header(folder / START_FILE)
    wanted = {
        f"{module.name}.{factor.name}": module.factor_shape(factor, spec.shapes)
        for module in spec.modules
        for factor in STARTED
    }
    if {name: tuple(entry.shape) for name, entry in entries.items()} != wanted:
        raise UserError(f"{folder / START_FILE} is not of the adapter in {ADAPTER_FILE} beside it")
    return {name: read_tensor(entry) for name, entry in entries.items()}
