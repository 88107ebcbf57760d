"""Data sets of the Hugging Face hub: any name through `datasets`, and NeMo RL's short names with their fields."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lora.data.forms import Keys
from megatron_lora.errors import UserError

RawRow = Mapping[str, Any]


@dataclass(frozen=True)
class HubDataset:
    """Where a short name leads.

    adapt: turns one of its rows into a form that `examples` understands. sft_keys, prompt_keys: the fields that hold
    question and answer where the recipe names none, for training on answers and for GRPO.
    """

    path: str
    subset: str | None = None
    train_split: str = "train"
    adapt: Callable[[RawRow], RawRow] | None = None
    sft_keys: Keys = Keys()
    prompt_keys: Keys = Keys()


def _squad(row: RawRow) -> RawRow:
    return {
        "messages": [
            {"role": "system", "content": row["context"]},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answers"]["text"][0]},
        ]
    }


def _helpsteer3(row: RawRow) -> RawRow:
    """Negative preference: the first response is better. Zero: neither is, so the pair is made equal (and dropped)."""
    first, second = row["response1"], row["response2"]
    preference = row["overall_preference"]
    chosen = second if preference > 0 else first
    rejected = first if preference >= 0 else second
    return {"prompt": row["context"], "chosen": chosen, "rejected": rejected}


def _dapo_math(row: RawRow) -> RawRow:
    return {"messages": row["prompt"], "answer": row["reward_model"]["ground_truth"]}


def _number_as_text(row: RawRow) -> RawRow:
    return {**row, "answer": str(row["answer"])}


_PROBLEM = Keys("problem", "answer")
_TULU3_PREFERENCE = HubDataset("allenai/llama-3.1-tulu-3-8b-preference-mixture")
HUB_DATASETS = {
    "gsm8k": HubDataset("openai/gsm8k", subset="main"),
    "squad": HubDataset("rajpurkar/squad", adapt=_squad),
    "tulu3_sft_mixture": HubDataset("allenai/tulu-3-sft-mixture"),
    "tulu3_preference": _TULU3_PREFERENCE,
    "Tulu3Preference": _TULU3_PREFERENCE,
    "Nemotron-Cascade-2-SFT-Math": HubDataset("nvidia/Nemotron-Cascade-2-SFT-Data", subset="math"),
    "HelpSteer3": HubDataset("nvidia/HelpSteer3", adapt=_helpsteer3),
    "OpenMathInstruct-2": HubDataset(
        "nvidia/OpenMathInstruct-2",
        train_split="train_1M",
        sft_keys=Keys("problem", "generated_solution"),
        prompt_keys=Keys("problem", "expected_answer"),
    ),
    "DeepScaler": HubDataset(
        "agentica-org/DeepScaleR-Preview-Dataset", sft_keys=Keys("problem", "solution"), prompt_keys=_PROBLEM
    ),
    "AIME2024": HubDataset("HuggingFaceH4/aime_2024", sft_keys=Keys("problem", "solution"), prompt_keys=_PROBLEM),
    "AIME2026": HubDataset("MathArena/aime_2026", adapt=_number_as_text, sft_keys=_PROBLEM, prompt_keys=_PROBLEM),
    "DAPOMath17K": HubDataset("BytedTsinghua-SIA/DAPO-Math-17k", adapt=_dapo_math),
    "DAPOMathAIME2024": HubDataset("BytedTsinghua-SIA/AIME-2024", adapt=_dapo_math),
}


def load_hub_rows(entry: HubDataset, split: str | None) -> Sequence[RawRow]:
    """One split of a hub data set (or of a local folder that `datasets` understands). Raises UserError."""
    import datasets
    from datasets.exceptions import DatasetsError

    split = split or entry.train_split
    try:
        if (Path(entry.path) / "state.json").is_file() or (Path(entry.path) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(entry.path)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(entry.path, entry.subset, split=split)
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data set {entry.path} (split {split}) could not be loaded: {type(error).__name__}: {reason}; check the "
            "name, the split and the connection, or give a file of rows with data_path"
        ) from error
    assert isinstance(rows, datasets.Dataset)
    return rows  # type: ignore[return-value]  # a Dataset is indexed like a sequence of dicts
