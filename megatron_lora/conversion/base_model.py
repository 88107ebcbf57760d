"""The base model's Hugging Face folder: where it is."""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megatron_lora.errors import UserError

logger = logging.getLogger(__name__)

ADAPTER_FILES = ["adapter_config.json", "adapter_model.*"]
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# Some hub repositories hold their weights a second time in their authors' own format.
SECOND_COPIES = ["original/*", "consolidated*"]
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


def find_base(base_ckpt: str | None, hf_model_name: str | None, trained_on: str, *, weights: bool = True) -> Path:
    """A local HF folder: base_ckpt, else hf_model_name, else the name in adapter.json; names are fetched from the hub.

    weights=False fetches the small files only. Raises UserError where it cannot be found.
    """
    if base_ckpt is not None:
        folder = Path(base_ckpt).expanduser()
        if (folder / "config.json").is_file():
            return folder
        if hf_model_name is None:
            raise UserError(
                f"--base-ckpt {base_ckpt} is neither a Hugging Face folder (no config.json) nor a Megatron checkpoint "
                "that convert_hf_to_megatron.py or a run wrote; give one, or name the model with --hf-model-name"
            )
        logger.warning(
            "%s is no Hugging Face folder and no checkpoint of this project; the base is read from %s",
            base_ckpt,
            hf_model_name,
        )
    name = hf_model_name or trained_on
    if not name:
        raise UserError("the adapter does not name its base model; give --hf-model-name or --base-ckpt")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} is no Hugging Face model folder (no config.json)")
        return folder
    try:
        wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=SECOND_COPIES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the base model {name} is neither a folder here nor could it be fetched from the hub ({reason}); "
            "give its folder with --base-ckpt"
        ) from error


def find_adapter(name: Path | str) -> Path:
    """A local HF PEFT folder; a hub name is fetched. Raises UserError where it cannot be found."""
    folder = Path(name).expanduser()
    if folder.exists() or folder.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=ADAPTER_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the adapter {name} is neither a folder here nor could it be fetched from the hub ({reason}); "
            "check the path"
        ) from error


def cached_folder(name: str) -> Path | None:
    """Where a hub name's weights lie on this machine; None where they have not been fetched."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an HF folder. Raises UserError where it is missing or damaged."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a Hugging Face model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
