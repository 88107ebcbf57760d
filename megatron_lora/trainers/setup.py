"""From a recipe to what a loop needs. Everything that can fail on a user's mistake fails before weights load."""

from dataclasses import dataclass
from typing import Any

from megatron_lora.config.layout_checks import check_layout, model_shape_from_hf_config
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_data import DatasetConfig
from megatron_lora.data.dataset import (
    Preparation,
    build_preference_dataset,
    build_prompt_dataset,
    build_sft_dataset,
)
from megatron_lora.data.examples import load_instructions
from megatron_lora.data.loader import GroupLoader
from megatron_lora.data.sources import Source, SourceSpec, load_sources
from megatron_lora.data.tokenize import EncodingOptions
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.interface import Policy
from megatron_lora.policy.weights_check import check_base_weights
from megatron_lora.runtime.world import World
from megatron_lora.trainers.dpo import check_dpo
from megatron_lora.trainers.grpo_setup import (
    build_prompt_loaders,
    check_grpo,
    check_reward_columns,
    fewest_batches,
    longest_prompt,
)


@dataclass
class Prepared:
    """What is ready before any weight is loaded. datasets: what the loaders read."""

    recipe: Recipe
    tokenizer: Any
    train: Any
    validation: Any | None


def prepare(recipe: Recipe, world: World) -> Prepared:
    """Check layout, weights' files and data, and tokenize. Raises UserError."""
    shape = model_shape_from_hf_config(recipe.policy.model_name)
    check_layout(recipe.policy, shape, world.size)
    check_base_weights(recipe.policy)
    planned_adapter(recipe.policy)
    if recipe.algorithm == "dpo":
        check_dpo(recipe)
    elif recipe.algorithm == "grpo":
        check_grpo(recipe, world)
    tokenizer = load_tokenizer(recipe.policy.tokenizer.name or "", recipe.policy.tokenizer.chat_template)
    train_source, validation_source = sources(recipe)
    builders = {"sft": build_sft_dataset, "dpo": build_preference_dataset, "grpo": build_prompt_dataset}
    build: Any = builders[recipe.algorithm]
    train = build(train_source, tokenizer, preparation(recipe, recipe.data.train, world))
    validation = None
    if validation_source is not None:
        section = recipe.data.validation or recipe.data.train
        validation = build(validation_source, tokenizer, preparation(recipe, section, world))
    if recipe.algorithm == "grpo":
        check_reward_columns(recipe, [prompts for prompts in (train, validation) if prompts is not None])
    return Prepared(recipe=recipe, tokenizer=tokenizer, train=train, validation=validation)


def sources(recipe: Recipe) -> tuple[Source, Source | None]:
    """The rows of `data.train` and `data.validation`."""
    train = recipe.data.train
    return load_sources(
        _source_spec(train),
        _source_spec(recipe.data.validation) if recipe.data.validation is not None else None,
        split_validation_size=train.split_validation_size or 0.0,
        seed=train.seed if train.seed is not None else recipe.seed,
    )


def _source_spec(section: DatasetConfig) -> SourceSpec:
    return SourceSpec(
        dataset_name=section.dataset_name,
        data_path=section.data_path,
        split=section.split,
        subset=section.subset,
        input_key=section.input_key,
        output_key=section.output_key,
        chosen_key=section.chosen_key,
        rejected_key=section.rejected_key,
    )


def preparation(recipe: Recipe, section: DatasetConfig, world: World) -> Preparation:
    """How rows become tokens."""
    data = recipe.data
    limit = recipe.policy.max_total_sequence_length
    if recipe.algorithm == "grpo":
        limit = longest_prompt(recipe)
    return Preparation(
        max_length=limit,
        options=EncodingOptions(
            add_bos=data.add_bos,
            add_eos=data.add_eos,
            only_unmask_final=bool(recipe.sft and recipe.sft.only_unmask_final),
            chat_template_kwargs=dict(recipe.policy.tokenizer.chat_template_kwargs or {}),
        ),
        instructions=load_instructions(section.prompt_file, section.system_prompt_file),
        num_workers=data.num_workers,
        show_progress=world.is_main,
    )


def build_loaders(prepared: Prepared) -> tuple[GroupLoader, GroupLoader | None]:
    """The training loader, and the validation's. GRPO's hand out prompts, the others groups of rows."""
    recipe = prepared.recipe
    if recipe.grpo is not None:
        return build_prompt_loaders(recipe, prepared.train, prepared.validation)
    section = recipe.sft or recipe.dpo
    assert section is not None
    train = GroupLoader(
        prepared.train, recipe.policy.train_global_batch_size, seed=recipe.seed, shuffle=recipe.data.shuffle
    )
    if prepared.validation is None:
        return train, None
    size = min(section.val_global_batch_size, len(prepared.validation))
    validation = GroupLoader(
        prepared.validation, size, shuffle=False, drop_last=False, size_key=f"{recipe.algorithm}.val_global_batch_size"
    )
    return train, validation


def count_steps(recipe: Recipe, batches_an_epoch: int) -> int:
    """The run's length: whichever of max_num_steps and max_num_epochs ends first. With dynamic sampling, which may take
    any number of batches a step, the most that it can be."""
    section = recipe.sft or recipe.dpo or recipe.grpo
    assert section is not None
    batches = section.max_num_epochs * batches_an_epoch
    if recipe.grpo is not None:
        batches = max(1, batches // fewest_batches(recipe.grpo))
    return min(section.max_num_steps, batches)


def count_updates(recipe: Recipe, num_steps: int) -> int:
    """Optimizer steps of the run: GRPO takes several a rollout where the batch is a part of its samples."""
    if recipe.grpo is None:
        return num_steps
    samples = recipe.grpo.num_prompts_per_step * recipe.grpo.num_generations_per_prompt
    return num_steps * (samples // recipe.policy.train_global_batch_size)


def build_world(recipe: Recipe) -> World:
    """Join the other ranks in the recipe's layout."""
    if recipe.policy.backend == "megatron":
        from megatron_lora.runtime.world import init_megatron_world

        return init_megatron_world(recipe.policy, recipe.seed)
    from megatron_lora.runtime.world import init_dtensor_world

    return init_dtensor_world(recipe.policy, recipe.seed)


def build_policy(recipe: Recipe, world: World, tokenizer: Any, num_updates: int) -> Policy:
    """The backend that the recipe selects, base weights loaded."""
    if recipe.policy.backend == "megatron":
        from megatron_lora.policy.megatron.policy import MegatronPolicy as Backend
    else:
        from megatron_lora.policy.dtensor.policy import DTensorPolicy as Backend
    return Backend(recipe.policy, world, pad_token_id=tokenizer.pad_token_id, seed=recipe.seed, num_steps=num_updates)
