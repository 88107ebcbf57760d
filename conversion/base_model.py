"""The base model's Hugging Face folder: where it is, and whether it is the one an adapter was trained on."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from conversion.fingerprint import fingerprint_base
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModelShapes

logger = logging.getLogger(__name__)

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# Some hub repositories hold their weights a second time in their authors' own format.
SECOND_COPIES = ["original/*", "consolidated*"]
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


def find_base(base_ckpt: str | None, hf_model_name: str | None, trained_on: str, *, weights: bool = True) -> Path:
    """A local HF folder: base_ckpt, else hf_model_name, else the name in adapter.json; names are fetched from the hub.

    weights=False fetches the small files only. Raises UserError where it cannot be found.
    """
    if base_ckpt is not None:
        folder = Path(base_ckpt)
        if (folder / "config.json").is_file():
            return folder
        if hf_model_name is None:
            raise UserError(
                f"--base-ckpt {base_ckpt} is no Hugging Face folder (no config.json); convert a Megatron checkpoint "
                "with convert_megatron_to_hf.py first, or name the model with --hf-model-name"
            )
        logger.warning("%s is no Hugging Face folder; the base is read from %s", base_ckpt, hf_model_name)
    name = hf_model_name or trained_on
    if not name:
        raise UserError("the adapter does not name its base model; give --hf-model-name or --base-ckpt")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name} is no Hugging Face model folder (no config.json)")
        return Path(name)
    try:
        wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=SECOND_COPIES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the base model {name} is neither a folder here nor could it be fetched from the hub ({reason}); "
            "give its folder with --base-ckpt"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an HF folder. Raises UserError where it is missing or damaged."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a Hugging Face model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def check_base(spec: AdapterSpec, folder: Path) -> None:
    """Raises UserError where the base has other shapes than the adapter's; warns where its weights are not the ones the
    adapter was trained on."""
    actual = ModelShapes.from_hf_config(read_config(folder))
    if actual != spec.shapes:
        wanted = asdict(spec.shapes)
        differing = [f"{key}={value} ({wanted[key]})" for key, value in asdict(actual).items() if value != wanted[key]]
        raise UserError(
            f"the adapter is for another base: {folder} has {', '.join(differing)}, in brackets what the adapter has"
        )
    if spec.base_fingerprint is not None and fingerprint_base(folder) != spec.base_fingerprint:
        logger.warning(
            "the weights in %s are not those that the adapter was trained on (%s); the result may be poor",
            folder,
            spec.base_model_name,
        )
