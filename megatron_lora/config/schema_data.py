"""What is trained on: `data`."""

from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_base import Fraction, Place, PositiveInt, Section, Seed


class DatasetConfig(Section):
    """`data.train`, `data.validation` and `data.default`."""

    dataset_name: str | None = Field(
        default=None, description="Hub name, or a built-in: `gsm8k`, `arithmetic`. Ignored where `data_path` is set."
    )
    data_path: Place | None = Field(
        default=None, description="File of rows: JSON lines or array (.gz, .zst), parquet, Arrow, CSV; or a folder."
    )
    subset: str | None = Field(default=None, description="Configuration of a hub data set.")
    split: str | None = Field(default=None, description="Split of a hub data set.")
    input_key: str | None = Field(default=None, description="Column of the prompt; null: found by the row's form.")
    output_key: str | None = Field(default=None, description="Column of the answer; null: found by the row's form.")
    chosen_key: str | None = Field(default=None, description="Preference rows: column of the preferred answer.")
    rejected_key: str | None = Field(default=None, description="Preference rows: column of the other answer.")
    prompt_key: str | None = Field(default=None, description="Preference rows: column of the prompt, as `input_key`.")
    chat_key: str | None = Field(default=None, description="Column of the messages; null: found by the row's form.")
    system_key: str | None = Field(default=None, description="Column of the system message; null: `system`.")
    tool_key: str | None = Field(default=None, description="Column of the tools; null: `tools`.")
    form: str | None = Field(
        default=None, description="The rows' form, where a row has the columns of two: a name of docs/data.md's table."
    )
    prompt_file: Place | None = Field(
        default=None, description="File with a text around each prompt, which stands at `{}`."
    )
    system_prompt_file: Place | None = Field(default=None, description="File with a system message for every row.")
    max_samples: PositiveInt | None = Field(
        default=None, description="Rows used, at most, drawn by `seed`, before any are held out; null: all."
    )
    split_validation_size: Fraction = Field(
        default=0.0, description="`data.train`: part of the rows held out; they join those of `data.validation`."
    )
    repeat: PositiveInt = Field(
        default=1, description="`data.validation` of GRPO: its prompts so many times over, each with draws of its own."
    )
    seed: Seed | None = Field(default=None, description="Seed of those two draws; null: the algorithm's.")
    also: "list[DatasetConfig]" = Field(
        default_factory=list,
        description="Further data sets, whose rows follow; a list in place of this section is read as its first entry "
        "and the others here. Each is held out of and repeated by its own keys.",
    )


class DataConfig(Section):
    """`data`."""

    train: DatasetConfig = Field(description="Training rows.")
    validation: DatasetConfig | None = Field(
        default=None, description="Validation rows; null: none, or a split of `train`."
    )
    default: DatasetConfig | None = Field(
        default=None, description="Values for keys that `train` and `validation` lack."
    )
    max_input_seq_length: PositiveInt | None = Field(
        default=None, description="GRPO: longest prompt, in tokens; null: `policy.max_total_sequence_length`."
    )
    num_workers: PositiveInt = Field(default=1, description="Processes that tokenize a large data set.")
    shuffle: bool = Field(default=True, description="New seeded order every epoch; off: the file's order.")
    add_bos: bool = Field(
        default=True, description="Begin a sequence with the tokenizer's begin-of-sequence token, if any."
    )
    add_eos: bool = Field(default=True, description="End the answer with the end-of-sequence token.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_datasets(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("default"), dict):
            return data
        filled = dict(data)
        for part in ("train", "validation"):
            if isinstance(data.get(part), dict):
                filled[part] = _filled(data[part], data["default"])
        return filled

    @model_validator(mode="after")
    def _only_validation_repeats(self) -> Self:
        for where, block in self.blocks():
            if where.startswith("train") and block.repeat > 1:
                raise ValueError(f"{where}.repeat={block.repeat}: training repeats by max_num_epochs; set it to 1")
            if block is not self.train and block is not self.validation and block.also:
                raise ValueError(f"{where}.also: a further data set has no others beside it; put them into one list")
        return self

    @model_validator(mode="after")
    def _one_prompt_key(self) -> Self:
        for part, block in self.blocks():
            if None not in (block.input_key, block.prompt_key):
                raise ValueError(f"{part} has both input_key and prompt_key, which mean the same; keep one")
            if block.form is not None and (block.input_key or block.chat_key):
                raise ValueError(f"{part} has both form and a column's name (input_key or chat_key); keep one")
        return self

    @model_validator(mode="after")
    def _sources(self) -> Self:
        for part, dataset in self.blocks():
            if dataset.dataset_name is None and dataset.data_path is None:
                raise ValueError(f"{part} names no rows; set {part}.dataset_name or {part}.data_path")
        return self

    def blocks(self) -> Iterator[tuple[str, DatasetConfig]]:
        """(name, section) of every data set."""
        for name, first in (("train", self.train), ("validation", self.validation)):
            if first is not None:
                yield name, first
                yield from ((f"{name}.also[{number}]", block) for number, block in enumerate(first.also))

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows: of their own, or held out of the training rows."""
        return self.validation is not None or any(block.split_validation_size for _, block in self.blocks())


def _filled(block: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """A block, and those beside it, with what they lack."""
    given = {key: value for key, value in block.items() if value is not None}
    others = [_filled(item, default) if isinstance(item, dict) else item for item in given.get("also", [])]
    return {**default, **given, **({"also": others} if others else {})}


def as_one_block(blocks: Any) -> Any:
    """A list of data sets (NeMo RL's shape) as its first entry with the others beside it; anything else as it is."""
    if not isinstance(blocks, list) or not blocks or not all(isinstance(item, dict) for item in blocks):
        return blocks
    return blocks[0] | {"also": blocks[1:]} if len(blocks) > 1 else blocks[0]
