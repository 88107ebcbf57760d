"""Adam's state in a checkpoint of either backend, in one form: whole tensors under Hugging Face names.

A run that goes on with the backend that wrote its checkpoint loads that backend's own files, each rank its part. A run
that changes the backend reads them as an `AdamState`. (Weights need no such form: an adapter's have one on both, and
`conversion.megatron_weights` reads a whole model's of either.)
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_lora.conversion.megatron_weights import HF_EMBEDDING
from megatron_lora.conversion.model_names import EMBEDDING, ModelParameter, model_parameters, unfuse
from megatron_lora.conversion.torch_dist import COMMON_STATE, TorchDistFolder
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModelSpec
from megatron_lora.lora.peft_format import PREFIX, to_hf

MOMENTS = ("exp_avg", "exp_avg_sq")
# The DTensor backend's names: what is not sharded, as pickled bytes, and `state.<HF name>.<field>`.
COMMON, STATE = "common", "state"
Backend = Literal["megatron", "dtensor"]


@dataclass(frozen=True)
class AdamState:
    """step: updates taken. schedule: what the run's scheduler stored of itself. moments: of each of MOMENTS the whole
    tensors by HF name (an adapter's by PEFT name), read when asked for; none where it was another kind of optimizer."""

    step: int
    schedule: Mapping[str, Any]
    moments: Mapping[str, Mapping[str, Tensor]]


def optimizer_backend(folder: Path) -> Backend | None:
    """Which backend wrote this `policy/optimizer`; None where none did."""
    return _backend(folder, {COMMON_STATE: "megatron", COMMON: "dtensor"})


def whole_model_backend(folder: Path) -> Backend | None:
    """Which backend wrote this `policy/weights` in full fine-tuning; None where none did."""
    return _backend(folder, {EMBEDDING: "megatron", HF_EMBEDDING: "dtensor"})


def _backend(folder: Path, marks: Mapping[str, Backend]) -> Backend | None:
    keys = TorchDistFolder(folder).keys if (folder / ".metadata").is_file() else frozenset()
    return next((backend for key, backend in marks.items() if key in keys), None)


def read_adam(folder: Path, spec: AdapterSpec | None, shapes: ModelSpec) -> AdamState:
    """spec: of the adapter, None for a whole model. Raises UserError where the folder does not fit, or is damaged."""
    stored = TorchDistFolder(folder)
    return (
        _read_megatrons(stored, spec, shapes)
        if COMMON_STATE in stored.keys
        else _read_dtensors(stored, adapter=spec is not None)
    )


def _read_megatrons(stored: TorchDistFolder, spec: AdapterSpec | None, shapes: ModelSpec) -> AdamState:
    common = stored.read_object(COMMON_STATE)
    moments = {
        kind: _megatrons_model(stored, f"optimizer.{kind}.", shapes)
        if spec is None
        else _megatrons_adapter(stored, f"optimizer.{kind}.", spec)
        for kind in MOMENTS
    }
    return AdamState(int(common["optimizer"]["step"]), common["scheduler"], moments)


def _megatrons_adapter(stored: TorchDistFolder, prefix: str, spec: AdapterSpec) -> Mapping[str, Tensor]:
    wanted = {f"{prefix}{factor}": shape for factor, shape in spec.factor_shapes().items()}
    _check_known(stored, wanted)
    # The output layer's rows may be padded.
    fused = {key.removeprefix(prefix): value[: wanted[key][0]] for key, value in stored.read(wanted).items()}
    return to_hf(spec, fused)[1]


def _megatrons_model(stored: TorchDistFolder, prefix: str, shapes: ModelSpec) -> Mapping[str, Tensor]:
    parameters = {name: parameter for parameter in model_parameters(shapes) for name in parameter.hf_names}
    _check_known(stored, [f"{prefix}{parameter.name}" for parameter in parameters.values()])
    # q, k and v are asked for one after the other.
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        parameter: ModelParameter = parameters[name]
        key = f"{prefix}{parameter.name}"
        if key not in last:
            last.clear()
            last.update(stored.read([key]))
        return unfuse(parameter, last[key], name, shapes)

    return _WhenAsked(parameters, read)


def _read_dtensors(stored: TorchDistFolder, *, adapter: bool) -> AdamState:
    common = pickle.loads(stored.read([COMMON])[COMMON].numpy().tobytes())
    steps = [int(value) for name, value in common["values"].items() if name.endswith(".step")]
    kinds = [kind for kind in MOMENTS if any(name.endswith(f".{kind}") for name in stored.tensors)]
    moments = {kind: _dtensors_moment(stored, kind, adapter=adapter) for kind in kinds}
    return AdamState(max(steps, default=0), common["schedule"], moments)


def _dtensors_moment(stored: TorchDistFolder, kind: str, *, adapter: bool) -> Mapping[str, Tensor]:
    start, end = f"{STATE}.", f".{kind}"
    keys = {
        key.removeprefix(start).removesuffix(end): key
        for key in stored.tensors
        if key.startswith(start) and key.endswith(end)
    }
    if adapter:
        # An A that linears share is stored once, under the first one's name.
        keys = {PREFIX + name.replace(".default", ""): key for name, key in keys.items()}
    return _WhenAsked(keys, lambda name: stored.read([keys[name]])[keys[name]])


def _check_known(stored: TorchDistFolder, keys: Iterable[str]) -> None:
    missing = [key for key in keys if key not in stored.tensors]
    if missing:
        raise UserError(f"{stored.folder} holds the optimizer of another model or adapter: it lacks {missing[0]}")


class _WhenAsked(Mapping[str, Tensor]):
    """Tensors that are read one at a time."""

    def __init__(self, names: Mapping[str, Any], read: Callable[[str], Tensor]):
        self._names = names
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
