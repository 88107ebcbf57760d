"""Modules that train whole beside adapters (peft's `modules_to_save`): norms, embeddings and the output layer, each of
which is one tensor on both sides."""

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence

from megatron_lora.conversion.model_names import ModelParameter, model_parameters
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ModelSpec
from megatron_lora.lora.model_spec import EMBEDDING, OUTPUT_LAYER
from megatron_lora.lora.peft_format import hf_linears


def saved_parameters(shapes: ModelSpec) -> dict[str, ModelParameter]:
    """HF tensor name -> parameter, of all that could be trained whole: not a norm that has a bias beside it."""
    every = {parameter.hf_names[0]: parameter for parameter in model_parameters(shapes)}
    norms = {name for name, parameter in every.items() if len(parameter.shape) == 1 and name.endswith(".weight")}
    plain = {name for name in norms if f"{name.removesuffix('weight')}bias" not in every}
    return {name: parameter for name, parameter in every.items() if parameter.is_vocabulary or name in plain}


def select_saved(shapes: ModelSpec, patterns: Sequence[str], adapted: Sequence[str], key: str) -> dict[str, tuple]:
    """HF tensor name -> shape, in the model's order, of what the recipe's `key` trains whole.

    patterns: a module's name (`norm`, `input_layernorm`, `embed_tokens`, `lm_head`; Megatron's `final_layernorm`,
    `word_embeddings`, `output_layer`), its full path, with `model.` or without, or a wildcard over full paths. adapted:
    HF linears that carry adapters. Raises UserError for a name that is no such module, for one tensor under two names
    (tied embeddings), and for a module that is adapted already.
    """
    if not patterns:
        return {}
    known = {name: parameter.shape for name, parameter in saved_parameters(shapes).items()}
    if shapes.tied_embeddings:
        known |= {name: (shapes.vocab_size, shapes.hidden_size) for name in _tied(shapes)}
    in_megatron = {name: parameter.name for name, parameter in saved_parameters(shapes).items()}
    if shapes.tied_embeddings:
        in_megatron |= dict(zip(_tied(shapes), (EMBEDDING, OUTPUT_LAYER), strict=True))
    wanted: set[str] = set()
    for pattern in patterns:
        found = {
            name
            for name in known
            if any(_fits(pattern, called.removesuffix(".weight")) for called in (name, in_megatron[name]))
        }
        if not found:
            raise _no_such_module(pattern, known, shapes, key)
        wanted |= found
    saved = {name: shape for name, shape in known.items() if name in wanted}
    check_saved(shapes, saved, adapted, key)
    return saved


def check_saved(shapes: ModelSpec, saved: Mapping[str, tuple], adapted: Sequence[str], key: str) -> None:
    """Raise UserError unless these tensors can be trained whole on this model beside adapters on those linears."""
    if not saved:
        return
    known = saved_parameters(shapes)
    for name, shape in saved.items():
        module = name.removesuffix(".weight")
        if shapes.tied_embeddings and name in _tied(shapes):
            raise UserError(
                f"{key} has {module}, but this model's output layer is its embedding (tied): trained under one name it "
                "would change under the other too, and peft would load two different copies; leave it out, or train "
                "the whole model"
            )
        if name not in known:
            raise _no_such_module(module, known, shapes, key)
        if tuple(shape) != known[name].shape:
            raise UserError(f"{key}: {module} has shape {tuple(shape)}, this model's is {known[name].shape}")
        if module in adapted:
            raise UserError(f"{key} trains {module} whole, and target_modules adapts it; keep one of the two")


def _tied(shapes: ModelSpec) -> tuple[str, str]:
    return shapes.hf_embedding, "lm_head.weight"


def _fits(pattern: str, module: str) -> bool:
    if pattern in (module, module.removeprefix("model."), module.rsplit(".", 1)[-1]):
        return True
    return any(sign in pattern for sign in "*?[") and fnmatch.fnmatchcase(module, pattern)


def _no_such_module(pattern: str, known: Collection[str], shapes: ModelSpec, key: str) -> UserError:
    leaves = list(dict.fromkeys(name.removesuffix(".weight").rsplit(".", 1)[-1] for name in known))
    if any(_fits(pattern, name) for name in hf_linears(shapes)):
        return UserError(
            f"{pattern!r} in {key} is a linear of the layers, which trains through an adapter (so does a router); name "
            f"it in target_modules, or train the whole model. Modules that train whole: {', '.join(leaves)}"
        )
    near = difflib.get_close_matches(pattern, [*leaves, *known], n=3, cutoff=0.4) or leaves
    return UserError(
        f"{pattern!r} in {key} is no module of this model that trains whole (norms, embeddings, output layer); "
        f"near names: {', '.join(near)}"
    )
