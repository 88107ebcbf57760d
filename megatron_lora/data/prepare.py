"""From a recipe's `data` to tokenized rows: what a run and `data.show` read alike."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_data import DatasetConfig
from megatron_lora.data.dataset import (
    Preparation,
    PromptDataset,
    TokenizedDataset,
    build_preference_dataset,
    build_prompt_dataset,
    build_sft_dataset,
)
from megatron_lora.data.examples import load_instructions
from megatron_lora.data.forms import named_form
from megatron_lora.data.references import rows_without_reference
from megatron_lora.data.sources import Source, SourceSpec, load_sources
from megatron_lora.data.tokenize import EncodingOptions
from megatron_lora.data.tokenizer import end_tokens, load_tokenizer
from megatron_lora.data.values import RowError
from megatron_lora.errors import UserError

BUILDERS: dict[str, Any] = {"sft": build_sft_dataset, "dpo": build_preference_dataset, "grpo": build_prompt_dataset}
Dataset = TokenizedDataset | PromptDataset


@dataclass
class PreparedData:
    """Tokenized rows, and the sources they came from."""

    tokenizer: PreTrainedTokenizerBase
    train_source: Source
    validation_source: Source | None
    train: Any
    validation: Any | None

    def lines(self) -> list[str]:
        """What the log and --dry-run say of the rows: counts, drops and why, what is not honoured."""
        lines = []
        for name, source, dataset in self.sets:
            lines += [f"{name}: {line}" for line in (*dataset.stats.lines(), *source.notices)]
        return lines

    @property
    def sets(self) -> list[tuple[str, Source, Any]]:
        """(name, source, data set) of each."""
        sets = [("train", self.train_source, self.train)]
        if self.validation_source is not None:
            sets.append(("validation", self.validation_source, self.validation))
        return sets


def prepare_data(recipe: Recipe, show_progress: bool = False) -> PreparedData:
    """Load the tokenizer and the rows, and tokenize them. Raises UserError."""
    chosen = recipe.policy.tokenizer
    tokenizer = load_tokenizer(chosen.name or recipe.policy.model_name, chosen.chat_template)
    train_source, validation_source = sources(recipe)
    build = BUILDERS[recipe.algorithm]
    options = encoding_options(recipe, tokenizer)
    train = build(train_source, tokenizer, preparation(recipe, recipe.data.train, options, show_progress))
    validation = None
    if validation_source is not None:
        section = recipe.data.validation or recipe.data.train
        validation = build(validation_source, tokenizer, preparation(recipe, section, options, show_progress))
    data = PreparedData(tokenizer, train_source, validation_source, train, validation)
    if recipe.grpo is not None:
        for _, source, prompts in data.sets:
            _check_references(recipe, source, prompts)
    return data


def _check_references(recipe: Recipe, source: Source, prompts: PromptDataset) -> None:
    """Raises UserError where a reward compares with a reference answer that a row does not have."""
    names = [reward.name for reward in recipe.env.reward_functions if reward.needs_reference]
    missing = rows_without_reference(prompts) if names else ""
    if missing:
        raise UserError(
            f"{source.name}: {missing}; env.reward_functions has {', '.join(map(repr, names))}, which compares answers "
            "with it; name its column with output_key, mend the rows, or use another reward"
        )


def sources(recipe: Recipe) -> tuple[Source, Source | None]:
    """The rows of `data.train` and `data.validation`. Raises UserError."""
    train, validation = recipe.data.train, recipe.data.validation
    specs = [None if section is None else _source_spec(section) for section in (train, validation)]
    for part, spec in zip(("train", "validation"), specs, strict=True):
        try:
            if spec is not None:
                named_form(spec.keys, recipe.algorithm)
        except RowError as error:
            raise UserError(f"data.{part}.{error}") from error
    assert specs[0] is not None
    return load_sources(
        specs[0],
        specs[1],
        split_validation_size=train.split_validation_size or 0.0,
        seed=train.seed if train.seed is not None else recipe.seed,
    )


def _source_spec(section: DatasetConfig) -> SourceSpec:
    return SourceSpec(**{name: getattr(section, name) for name in SourceSpec.__dataclass_fields__})


def encoding_options(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> EncodingOptions:
    """How text becomes tokens."""
    return EncodingOptions(
        add_bos=recipe.data.add_bos,
        add_eos=recipe.data.add_eos,
        end_token_ids=tuple(end_tokens(recipe.policy.model_name, tokenizer)),
        only_unmask_final=bool(recipe.sft and recipe.sft.only_unmask_final),
        chat_template_kwargs=dict(recipe.policy.tokenizer.chat_template_kwargs or {}),
    )


def preparation(recipe: Recipe, section: DatasetConfig, options: EncodingOptions, show_progress: bool) -> Preparation:
    """How the rows of one block become tokens. Raises UserError."""
    return Preparation(
        max_length=longest_prompt(recipe) if recipe.grpo is not None else recipe.policy.max_total_sequence_length,
        options=options,
        instructions=load_instructions(section.prompt_file, section.system_prompt_file),
        num_workers=recipe.data.num_workers,
        show_progress=show_progress,
    )


def longest_prompt(recipe: Recipe) -> int:
    """Tokens of the longest prompt that GRPO keeps: one token of an answer must fit behind it."""
    policy = recipe.policy
    limits = [policy.max_total_sequence_length - 1]
    if recipe.data.max_input_seq_length is not None:
        limits.append(recipe.data.max_input_seq_length)
    if policy.generation.backend == "vllm" and policy.generation.vllm_cfg.max_model_len is not None:
        limits.append(policy.generation.vllm_cfg.max_model_len - 1)
    return min(limits)
