"""What is trained on: `data`."""

from typing import Any, Self

from pydantic import Field, model_validator

from megatron_lora.config.schema_base import Fraction, Int, Place, PositiveInt, Section


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
    split_validation_size: Fraction = Field(
        default=0.0, description="Part of the training rows held out where `data.validation` is null."
    )
    repeat: PositiveInt = Field(
        default=1, description="`data.validation` of GRPO: its prompts so many times over, each with draws of its own."
    )
    seed: Int | None = Field(default=None, description="Seed of that split; null: the algorithm's.")


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
                given = {key: value for key, value in data[part].items() if value is not None}
                filled[part] = {**data["default"], **given}
        return filled

    @model_validator(mode="after")
    def _only_validation_repeats(self) -> Self:
        if self.train.repeat > 1:
            raise ValueError(f"train.repeat={self.train.repeat}: training repeats by max_num_epochs; set it to 1")
        return self

    @model_validator(mode="after")
    def _one_prompt_key(self) -> Self:
        for part in ("train", "validation"):
            block = getattr(self, part)
            if block is not None and None not in (block.input_key, block.prompt_key):
                raise ValueError(f"{part} has both input_key and prompt_key, which mean the same; keep one")
            if block is not None and block.form is not None and (block.input_key or block.chat_key):
                raise ValueError(f"{part} has both form and a column's name (input_key or chat_key); keep one")
        return self

    @model_validator(mode="after")
    def _sources(self) -> Self:
        for part in ("train", "validation"):
            dataset = getattr(self, part)
            if dataset is not None and dataset.dataset_name is None and dataset.data_path is None:
                raise ValueError(f"{part} names no rows; set {part}.dataset_name or {part}.data_path")
        return self
