"""A whole model to convert or to merge into: an HF folder, or a Megatron checkpoint with the files that make it one."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_lora.checksums import check_as_written
from megatron_lora.conversion.base_model import WEIGHT_ENDINGS, find_base, read_config
from megatron_lora.conversion.config_overrides import overridden
from megatron_lora.conversion.fingerprint import fingerprint_weights
from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.conversion.hf_model import QUANTIZATION, read_hf_model
from megatron_lora.conversion.inventory import open_model
from megatron_lora.conversion.megatron_weights import MegatronWeights
from megatron_lora.conversion.safetensors_io import SafetensorsFolder
from megatron_lora.conversion.shard_writer import write_shards
from megatron_lora.conversion.tower import FileNames, has_file_names, text_content, with_text
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.four_bit import weight_names
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec, ModelSpec

logger = logging.getLogger(__name__)

# What convert_hf_to_megatron.py puts beside the weights: everything of the HF folder but its weights.
HF_FOLDER = "hf"
# What it writes of where the model came from, and in it how the files of a vision-language model named its tensors.
SOURCE_FILE, NAMES = "source.json", "file_names"


@dataclass(frozen=True)
class ModelSource:
    """folder: config, generation config, tokenizer. weights: under HF names. tokenizer: a run's own, where there is
    one. overrides: what a run has in place of fields of the folder's config."""

    folder: Path
    weights: WeightSource
    tokenizer: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> ModelSpec:
        return read_hf_model(self.folder, overrides=self.overrides).shapes

    def copy_small_files(self, out: Path, dtype: torch.dtype | None = None) -> None:
        """Config (with `overrides`), generation config, tokenizer, license: every file that is no weights. dtype: to
        name in the config; None for the one that it names."""
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_ENDINGS):
                shutil.copyfile(path, out / path.name)
        if self.overrides:
            config = read_config(out)
            _write_config(out, with_text(config, overridden(text_content(config), self.overrides)))
        if isinstance(self.weights, FourBitFolder):
            # What is written beside it is dense.
            config = read_config(out)
            _write_config(out, {name: value for name, value in config.items() if name != QUANTIZATION})
        if dtype is not None:
            write_config_dtype(out, dtype)
        if self.tokenizer is not None:
            for path in self.tokenizer.iterdir():
                if path.is_file():
                    shutil.copyfile(path, out / path.name)

    @contextmanager
    def as_hf_folder(self, beside: Path) -> Iterator[Path]:
        """A folder that transformers loads: this one, or a temporary one in the folder `beside`."""
        in_place = isinstance(self.weights, SafetensorsFolder)
        if in_place and not self.overrides:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(dir=beside, prefix=".base-") as name:
            self.copy_small_files(Path(name))
            if in_place:
                for path in self.folder.iterdir():
                    if path.name.endswith(WEIGHT_ENDINGS):
                        (Path(name) / path.name).symlink_to(path.resolve())
                yield Path(name)
                return
            described = {key: (entry.dtype, entry.shape) for key, entry in self.weights.entries.items()}
            write_shards(Path(name), self.weights, described, self.weights.read, title="base for the check")
            yield Path(name)


def write_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let config.json name this dtype."""
    config = read_config(folder)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_config(folder, config)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def open_base(
    base_ckpt: str | None, hf_model_name: str | None, trained_on: str, overrides: Mapping[str, Any] | None = None
) -> ModelSource:
    """The base model: base_ckpt (an HF folder or a Megatron checkpoint), else hf_model_name, else trained_on.

    overrides: of its config's fields (`overrides_of_run`). Raises UserError where it cannot be found or read.
    """
    given = dict(overrides or {})
    if base_ckpt is not None and _weights_folder(Path(base_ckpt)) is not None:
        return replace(open_checkpoint(base_ckpt, hf_model_name or trained_on), overrides=given)
    folder = find_base(base_ckpt, hf_model_name, trained_on)
    weights = open_model(hf_model_name or base_ckpt or trained_on, folder, given)[1]
    return ModelSource(folder, weights, overrides=given)


def open_checkpoint(checkpoint: Path | str, hf_model_name: str | None = None) -> ModelSource:
    """A whole model that convert_hf_to_megatron.py or a run of full fine-tuning wrote.

    Its config comes from the `hf` folder beside the weights, else from hf_model_name, else from the model that the
    run's config.yaml names. Raises UserError for another folder, damaged weights, or where no config is found.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not a folder; give a Megatron checkpoint or a run's step_N folder")
    weights = _weights_folder(checkpoint)
    if weights is None:
        raise UserError(
            f"{checkpoint} holds no policy/weights/.metadata; give what convert_hf_to_megatron.py wrote, or a complete "
            "step_N folder of full fine-tuning"
        )
    if (weights / ADAPTER_FILE).is_file():
        raise UserError(f"{checkpoint} holds an adapter, not a whole model; use convert_lora_to_hf.py")
    top = weights.parent.parent
    if (top / HF_FOLDER / "config.json").is_file():
        folder = top / HF_FOLDER
    else:
        name = hf_model_name or _model_of_run(top)
        if not name:
            raise UserError(f"{checkpoint} does not say which model it is; name it with --hf-model-name")
        folder = find_base(None, name, name, weights=False)
    tokenizer = top / "policy" / "tokenizer"
    overrides = overrides_of_run(top)
    shapes = read_hf_model(folder, overrides=overrides).shapes
    names = _file_names(top) if has_file_names(shapes) else None
    source = ModelSource(
        folder, MegatronWeights(weights, shapes, names), tokenizer if tokenizer.is_dir() else None, overrides
    )
    for used in (weights, top / HF_FOLDER, tokenizer):
        if used.is_dir():
            check_as_written(used)
    return source


def _file_names(checkpoint: Path) -> FileNames:
    try:
        record = json.loads((checkpoint / SOURCE_FILE).read_text())
        return FileNames(**record[NAMES])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint / SOURCE_FILE} does not say how the model's files name its tensors ({error!r}); convert the "
            "model again"
        ) from error


def as_trained_over(spec: AdapterSpec, base: ModelSource) -> ModelSource:
    """The base with the values that the adapter's run computed with: in 4 bits, where its recipe asked for them."""
    kind = spec.settings.get("quantization")
    if kind is None or isinstance(base.weights, FourBitFolder):
        return base
    double = bool(spec.settings.get("double_quantization"))
    return replace(base, weights=QuantizedWeights(base.weights, weight_names(spec.shapes), kind, double=double))


def check_base(spec: AdapterSpec, base: ModelSource) -> None:
    """Raises UserError where the base has other shapes than the adapter's; warns where its weights are not the ones the
    adapter was trained on."""
    check_shapes(spec, base.folder, base.overrides)
    if spec.base_fingerprint is not None and fingerprint_weights(base.weights) != spec.base_fingerprint:
        logger.warning(
            "the weights in %s are not those that the adapter was trained on (%s); the result may be poor",
            base.weights.folder,
            spec.base_model_name,
        )


def check_shapes(spec: AdapterSpec, folder: Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Raises UserError where the config in an HF folder, with `overrides`, has other shapes than the adapter's."""
    actual = read_hf_model(folder, overrides=overrides).shapes
    if actual != spec.shapes:
        differing = spec.shapes.differences(actual)
        raise UserError(
            f"the adapter is for another base: {folder} has {', '.join(differing)}, in brackets what the adapter has"
        )


def _weights_folder(checkpoint: Path) -> Path | None:
    """Of a step folder, of its `policy`, or the weights folder itself; None where it is neither."""
    folders = (checkpoint / "policy" / "weights", checkpoint / "weights", checkpoint)
    return next((folder for folder in folders if (folder / ".metadata").is_file()), None)


def overrides_of_run(step: Path) -> dict[str, Any]:
    """policy.hf_config_overrides of a step folder's resolved recipe; empty where there is none."""
    return dict(_policy_of_run(step).get("hf_config_overrides") or {})


def _model_of_run(step: Path) -> str | None:
    """policy.model_name of a step folder's resolved recipe."""
    return _policy_of_run(step).get("model_name")


def _policy_of_run(step: Path) -> dict[str, Any]:
    recipe = step / "config.yaml"
    if not recipe.is_file():
        return {}
    try:
        policy = yaml.safe_load(recipe.read_text())["policy"]
        return dict(policy)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{recipe} is damaged ({error!r}); name the model with --hf-model-name") from error
