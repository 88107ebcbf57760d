"""From a recipe's `data` to tokenized rows: what a run and `data.show` read alike."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_lora.config.algorithm_section import RowKind
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_data import DatasetConfig
from megatron_lora.data.dataset import (
    Preparation,
    PromptDataset,
    build_preference_dataset,
    build_prompt_dataset,
    build_sft_dataset,
    join,
)
from megatron_lora.data.examples import load_instructions
from megatron_lora.data.forms import named_form
from megatron_lora.data.references import rows_without_reference
from megatron_lora.data.sources import Source, SourceSpec, draw, hold_out, load_source
from megatron_lora.data.tokenize import EncodingOptions
from megatron_lora.data.tokenizer import end_tokens, load_tokenizer
from megatron_lora.data.values import RowError
from megatron_lora.errors import UserError

BUILDERS: dict[RowKind, Any] = {
    "conversations": build_sft_dataset,
    "pairs": build_preference_dataset,
    "prompts": build_prompt_dataset,
}


@dataclass(frozen=True)
class Part:
    """The rows of one block of `data.train` or `data.validation`. set: `train` or `validation`, whose rows they join.
    section: the block, which says how they are read. repeat: how often a set holds them."""

    set: str
    section: DatasetConfig
    source: Source
    repeat: int = 1


@dataclass
class PreparedData:
    """Tokenized rows, and the sources they came from. sets: (name, source, data set) of each block. train, validation:
    all blocks of a kind together."""

    tokenizer: PreTrainedTokenizerBase
    sets: list[tuple[str, Source, Any]]
    train: Any
    validation: Any | None

    def lines(self) -> list[str]:
        """What the log and --dry-run say of the rows: counts, drops and why, what is not honoured."""
        lines = []
        blocks = Counter(name for name, _, _ in self.sets)
        for name, source, dataset in self.sets:
            label = name if blocks[name] == 1 else f"{name}, {source.name}"
            lines += [f"{label}: {line}" for line in (*dataset.stats.lines(), *source.notices)]
        return lines


def prepare_data(recipe: Recipe, show_progress: bool = False) -> PreparedData:
    """Load the tokenizer and the rows, and tokenize them. Raises UserError."""
    chosen = recipe.policy.tokenizer
    tokenizer = load_tokenizer(chosen.name or recipe.policy.model_name, chosen.chat_template)
    build = BUILDERS[recipe.section.rows]
    options = encoding_options(recipe, tokenizer)
    parts = load_parts(recipe)
    built = [build(part.source, tokenizer, preparation(recipe, part.section, options, show_progress)) for part in parts]
    if recipe.section.rows == "prompts":
        for part, prompts in zip(parts, built, strict=True):
            _check_references(recipe, part.source, prompts)
    joined = {
        name: join([(rows, part.repeat) for part, rows in zip(parts, built, strict=True) if part.set == name])
        for name in ("train", "validation")
    }
    sets = [(part.set, part.source, rows) for part, rows in zip(parts, built, strict=True)]
    return PreparedData(tokenizer, sets, joined["train"], joined["validation"])


def _check_references(recipe: Recipe, source: Source, prompts: PromptDataset) -> None:
    """Raises UserError where a reward compares with a reference answer that a row does not have."""
    names = [reward.name for reward in recipe.env.reward_functions if reward.needs_reference]
    missing = rows_without_reference(prompts) if names else ""
    if missing:
        raise UserError(
            f"{source.name}: {missing}; env.reward_functions has {', '.join(map(repr, names))}, which compares answers "
            "with it; name its column with output_key, mend the rows, or use another reward"
        )


def load_parts(recipe: Recipe) -> list[Part]:
    """The rows of `data.train`, what is held out of them, and those of `data.validation`. Raises UserError."""
    data = recipe.data
    train, held_out = [], []
    for where, section in _blocks("data.train", data.train):
        source = _load(recipe, section, where)
        if section.split_validation_size:
            source, rows = hold_out(source, section.split_validation_size, _seed(recipe, section), where)
            held_out.append(Part("validation", section, rows))
        train.append(Part("train", section, source))
    given = [
        Part("validation", section, _load(recipe, section, where), section.repeat)
        for where, section in ([] if data.validation is None else _blocks("data.validation", data.validation))
    ]
    return train + held_out + given


def _blocks(where: str, first: DatasetConfig) -> list[tuple[str, DatasetConfig]]:
    """A block and those that stand beside it, with their paths for messages."""
    others = [(f"{where}.also[{number}]", section) for number, section in enumerate(first.also)]
    return [(where, first), *others]


def _load(recipe: Recipe, section: DatasetConfig, where: str) -> Source:
    spec = _source_spec(section)
    try:
        named_form(spec.keys, recipe.section.rows)
    except RowError as error:
        raise UserError(f"{where}.{error}") from error
    source = load_source(spec, where)
    return source if section.max_samples is None else draw(source, section.max_samples, _seed(recipe, section))


def _seed(recipe: Recipe, section: DatasetConfig) -> int:
    return section.seed if section.seed is not None else recipe.seed


def _source_spec(section: DatasetConfig) -> SourceSpec:
    return SourceSpec(**{name: getattr(section, name) for name in SourceSpec.__dataclass_fields__})


def encoding_options(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> EncodingOptions:
    """How text becomes tokens."""
    return EncodingOptions(
        add_bos=recipe.data.add_bos,
        add_eos=recipe.data.add_eos,
        end_token_ids=tuple(end_tokens(recipe.policy.model_name, tokenizer)),
        only_unmask_final=recipe.section.final_answer_only,
        chat_template_kwargs=dict(recipe.policy.tokenizer.chat_template_kwargs or {}),
    )


def preparation(recipe: Recipe, section: DatasetConfig, options: EncodingOptions, show_progress: bool) -> Preparation:
    """How the rows of one block become tokens. Raises UserError."""
    return Preparation(
        max_length=longest_prompt(recipe) if recipe.draws_answers else recipe.policy.max_total_sequence_length,
        options=options,
        instructions=load_instructions(section.prompt_file, section.system_prompt_file),
        num_workers=recipe.data.num_workers,
        show_progress=show_progress,
    )


def longest_prompt(recipe: Recipe) -> int:
    """Tokens of the longest prompt that is kept: one token of an answer must fit behind it."""
    policy = recipe.policy
    limits = [policy.max_total_sequence_length - 1]
    if recipe.data.max_input_seq_length is not None:
        limits.append(recipe.data.max_input_seq_length)
    if policy.generation.longest_sequence is not None:
        limits.append(policy.generation.longest_sequence - 1)
    return min(limits)
