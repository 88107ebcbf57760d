"""The language model within a vision-language one: its config, its names, and what stays of the whole.

Training is on text. What the run describes, builds and trains is the language model alone, under the names that it has
in transformers' whole model (`model.language_model.`), which are peft's. The vision tower and the projector are kept
tensors (`inventory.kept_tensors`). Files may use other names (those of before transformers 4.52): `FileNames`.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_lora.errors import UserError
from megatron_lora.lora.families import FILE_NAMES, replaced
from megatron_lora.lora.model_spec import TEXT, ModelSizes
from megatron_lora.lora.model_tables import HYBRIDS

# Vision-language models whose class holds the language model as `model.language_model` and its head as `lm_head`.
WITH_TOWER = (
    "gemma3",
    "internvl",
    "llava",
    "llava_next",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
)
TOWER = "model.language_model."
HEAD = "lm_head."
# What files call the two, newest first.
_TOWERS_IN_FILES = (TOWER, "language_model.model.", TEXT)
_HEADS_IN_FILES = (HEAD, "language_model.lm_head.")
# What files of a hybrid call its tensors, the published ones' first: transformers renames when it reads and writes.
_BODIES_IN_FILES = ("backbone.", TEXT)
_EMBEDDINGS_IN_FILES = ("embeddings.weight", "embedding.weight")
# Text configs whose rotary embeddings have a position in each of three directions (M-RoPE), which are the same for
# text; and the family of text alone that each then is.
TEXT_FAMILIES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_5_text": "qwen3_5_text",
    "qwen3_5_moe_text": "qwen3_5_moe_text",
}
# "type": the older spelling of rope_type, which is `mrope` there.
_MULTIMODAL_ROPE = ("mrope_section", "mrope_interleaved", "type")


@dataclass(frozen=True)
class FileNames:
    """How the files of a model name its tensors: see `_TOWERS_IN_FILES`. tower: what stands there for `own`. embedding:
    the last name of a hybrid's embedding there. packed: whether they hold one tensor of all experts of a layer. parts:
    of `families.FILE_NAMES` those that the files have."""

    tower: str = TOWER
    head: str = HEAD
    own: str = TOWER
    embedding: str = ""
    packed: bool = False
    parts: Sequence[Sequence[str]] = ()

    def in_file(self, name: str) -> str:
        """The name in the files of a tensor of the model."""
        return replaced(self._moved(name, *self._moves()), [(ours, theirs) for theirs, ours in reversed(self.parts)])

    def in_model(self, name: str) -> str:
        """The inverse of `in_file`."""
        return self._moved(replaced(name, self.parts), *((theirs, ours) for ours, theirs in self._moves()))

    def _moves(self) -> list[tuple[str, str]]:
        """(what the model has, what the files have), the first that fits a name."""
        moves = [(self.own, self.tower), (HEAD, self.head)]
        if self.embedding:
            moves.insert(0, (f"{self.own}{_EMBEDDINGS_IN_FILES[0]}", f"{self.tower}{self.embedding}"))
        return moves

    @staticmethod
    def _moved(name: str, *moves: tuple[str, str]) -> str:
        return next((new + name.removeprefix(old) for old, new in moves if name.startswith(old)), name)


def has_file_names(shapes: ModelSizes) -> bool:
    """Whether files of such a model may name its tensors otherwise than transformers' model does."""
    return bool(shapes.tower) or shapes.model_type in FILE_NAMES


def file_names(stored: Collection[str], where: object, shapes: ModelSizes) -> FileNames:
    """The names in files that hold these tensors of such a model. Raises UserError where they hold no language
    model."""
    if shapes.model_type in HYBRIDS:
        return _hybrid_file_names(stored, where)
    packed = any(name.endswith(".experts.down_proj") for name in stored)
    if shapes.model_type in FILE_NAMES:
        # A folder may have transformers' own names, too.
        parts = [pair for pair in FILE_NAMES[shapes.model_type] if any(pair[0] in name for name in stored)]
        return FileNames(TEXT, HEAD, TEXT, packed=packed, parts=parts)
    tower = next((prefix for prefix in _TOWERS_IN_FILES if f"{prefix}embed_tokens.weight" in stored), None)
    if tower is None:
        raise UserError(
            f"{where} holds no language model of a vision-language one: no embed_tokens.weight below "
            f"{', '.join(_TOWERS_IN_FILES)}; is it complete, and of this model?"
        )
    head = next((prefix for prefix in _HEADS_IN_FILES if f"{prefix}weight" in stored), HEAD)
    return FileNames(tower, head, packed=packed)


def _hybrid_file_names(stored: Collection[str], where: object) -> FileNames:
    for body in _BODIES_IN_FILES:
        for embedding in _EMBEDDINGS_IN_FILES:
            if f"{body}{embedding}" in stored:
                return FileNames(body, HEAD, TEXT, embedding)
    raise UserError(
        f"{where} holds no embedding of this model: no {' or '.join(_EMBEDDINGS_IN_FILES)} below "
        f"{' or '.join(_BODIES_IN_FILES)}; is it complete, and of this model?"
    )


def text_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is about the language model: `text_config`, or all of it where there is none."""
    text = content.get("text_config")
    return dict(text) if isinstance(text, Mapping) else dict(content)


def with_text(content: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with another `text_content`."""
    return {**content, "text_config": dict(text)} if isinstance(content.get("text_config"), Mapping) else dict(text)


def text_config(config: Any) -> Any:
    """transformers' config of the language model alone. config: of the whole model. Raises KeyError for a field that
    the family's class lacks."""
    from transformers import CONFIG_MAPPING

    text = copy.deepcopy(config.get_text_config())
    # The head is the whole model's.
    text.tie_word_embeddings = config.tie_word_embeddings
    family = TEXT_FAMILIES.get(text.model_type)
    if family is None:
        return text
    content = text.to_dict() | {"model_type": family}
    rope = content.get("rope_parameters") or {}
    content["rope_parameters"] = {name: value for name, value in rope.items() if name not in _MULTIMODAL_ROPE}
    return CONFIG_MAPPING[family].from_dict(content)


class LanguageTower(nn.Module):
    """A language model at the place that it has in a vision-language one, so that its parameters have their names."""

    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.language_model = language_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.language_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("language_model"), name)
