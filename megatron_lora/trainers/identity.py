"""What a checkpoint is of: kept in its training_info.json, compared with the run that is to go on from it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import Recipe
from megatron_lora.conversion.export import read_peft_folder
from megatron_lora.conversion.fingerprint import fingerprint_adapter
from megatron_lora.data.fingerprint import fingerprint_rows, fingerprint_tokenizer, first_difference
from megatron_lora.errors import UserError
from megatron_lora.policy.weights_check import local_fingerprint, read_base

# Fields of config.json that say nothing about the model's numbers.
NAMES_IN_CONFIG = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
)


@dataclass(frozen=True)
class RunIdentity:
    """algorithm: the recipe's. rows: names of the blocks of each data set ("train", "validation"), `num_rows` their
    sizes. tokenizer, base (None: a hub name), init_adapter (None: none): fingerprints. has_reference: whether the
    objective reads a reference policy. model_config: config.json's content. starts_at_reference: whether that is where
    the run starts, its starting adapter included."""

    algorithm: str
    rows: Mapping[str, list[str]]
    num_rows: Mapping[str, int]
    tokenizer: str
    base: str | None
    init_adapter: str | None
    has_reference: bool
    model_config: Mapping[str, Any] = field(default_factory=dict)
    starts_at_reference: bool = True

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any, train: Any, validation: Any | None) -> "RunIdentity":
        """Reads the prepared rows, the base's headers and the adapter that the run starts from."""
        sets = {"train": train, **({"validation": validation} if validation is not None else {})}
        kept = {
            key: value for key, value in read_base(recipe.policy).config.to_dict().items() if key not in NAMES_IN_CONFIG
        }
        init_adapter = recipe.policy.adapter.init_adapter if recipe.policy.adapter.enabled else None
        return cls(
            algorithm=recipe.algorithm,
            rows={name: fingerprint_rows(dataset) for name, dataset in sets.items()},
            num_rows={name: len(dataset) for name, dataset in sets.items()},
            tokenizer=fingerprint_tokenizer(tokenizer),
            base=local_fingerprint(recipe.policy.model_name),
            init_adapter=None if init_adapter is None else fingerprint_adapter(read_peft_folder(Path(init_adapter))[1]),
            has_reference=recipe.has_reference,
            starts_at_reference=recipe.policy.reference_policy == "start",
            # As it comes back from a file.
            model_config=json.loads(json.dumps(kept, default=str)),
        )

    def check_goes_on(self, stored: Mapping[str, Any] | None, folder: Path) -> list[str]:
        """Compare with what a checkpoint's training_info.json has under `run`; returns notices.

        Raises UserError where going on would train something else than what the checkpoint is of.
        """
        if stored is None:
            return [
                f"{folder} was written by an older release: it does not tell its rows, tokenizer and algorithm, so "
                "they were not compared"
            ]
        self._check_rows(stored, folder)
        notices = self._check_model(stored, folder)
        if stored["init_adapter"] != self.init_adapter:
            notices += self._other_start(folder)
        if stored["tokenizer"] != self.tokenizer:
            notices.append(
                f"the tokenizer is not the one of {folder} (vocabulary, rules or chat template), though the training "
                "rows come out the same"
            )
        ours, theirs = self.rows.get("validation"), stored["rows"].get("validation")
        if ours != theirs:
            notices.append(f"the validation rows are not those of {folder}: values before and after do not compare")
        return notices

    def check_algorithm(self, stored: str | None, folder: Path) -> None:
        """stored: the checkpoint's; None where it does not tell. Raises UserError for another one."""
        if stored is not None and stored != self.algorithm:
            raise UserError(
                f"{folder} is of a run of {stored.upper()}, this recipe runs {self.algorithm.upper()}: optimizer, "
                "schedule and step count would go on from the other; choose another checkpointing.checkpoint_dir"
                f"{_warm_start(folder)}"
            )

    def _check_rows(self, stored: Mapping[str, Any], folder: Path) -> None:
        found = first_difference(self.rows["train"], stored["rows"]["train"], self.num_rows["train"])
        count = stored["num_rows"]["train"]
        if count != self.num_rows["train"]:
            raise UserError(
                f"{folder} was trained on num_items={count} rows, this run has num_items={self.num_rows['train']}; "
                f"resume with the same data set, or start in a new checkpointing.checkpoint_dir{_warm_start(folder)}"
            )
        if found is None:
            return
        where = f"row {found[0]}" if found[0] == found[1] else f"one of rows {found[0]} to {found[1]}"
        also = ""
        if stored["tokenizer"] != self.tokenizer:
            also = "; the tokenizer or its chat template is another one, too"
        raise UserError(
            f"the training rows are not those of {folder}: of {count} usable rows {where} is the first that differs "
            f"as it is trained on (data.train, templates and lengths make it){also}; restore them, or start in a new "
            f"checkpointing.checkpoint_dir{_warm_start(folder)}"
        )

    def _check_model(self, stored: Mapping[str, Any], folder: Path) -> list[str]:
        ours, theirs = self.model_config, stored["model_config"]
        # Another release of transformers may have other fields.
        differing = [
            f"{key} {theirs[key]} -> {ours[key]}"
            for key in sorted(ours.keys() & theirs.keys())
            if theirs[key] != ours[key]
        ]
        if differing:
            values = ", ".join(differing)[:300]
            raise UserError(
                f"{folder} was trained on another model: its config.json had other values ({values}); "
                "set policy.model_name to that model or choose another checkpointing.checkpoint_dir"
            )
        if None not in (self.base, stored["base"]) and self.base != stored["base"]:
            if not self.has_reference and not (folder / "policy" / "weights" / "adapter.json").is_file():
                return [
                    f"the weights in policy.model_name are not those from which {folder} was trained; its own are used"
                ]
            raise UserError(
                f"{folder} was trained on another model: its weights differ from those in policy.model_name; name that "
                "model, or choose another checkpointing.checkpoint_dir"
            )
        return []

    def _other_start(self, folder: Path) -> list[str]:
        if not (self.has_reference and self.starts_at_reference):
            return [f"init_adapter is not the adapter from which {folder} started: not read, the checkpoint's is"]
        raise UserError(
            f"init_adapter is not the adapter from which {folder} started, and {self.algorithm.upper()}'s reference "
            "policy is that adapter; restore it, or choose another checkpointing.checkpoint_dir"
        )


def _warm_start(folder: Path) -> str:
    """How to start a new run from what the folder has learned."""
    if not (folder / "hf_adapter").is_dir():
        return ""
    return f" (its adapter can be the new run's start: init_adapter={folder / 'hf_adapter'})"
