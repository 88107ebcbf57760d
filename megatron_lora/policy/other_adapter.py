"""Another adapter on the run's own frozen base, in the shapes of the one that trains: a teacher that costs no second
model."""

from torch import Tensor

from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec, ModuleLayout
from megatron_lora.policy.adapter_start import planned_adapter, starting_adapter
from megatron_lora.policy.weights_check import read_base


def other_adapter(policy: PolicyConfig, folder: str, key: str) -> dict[str, Tensor]:
    """The whole factors of the adapter in an HF PEFT folder (`<module>.<factor>`, and modules that train whole by their
    HF names), as modules with the run's scales hold them. key: of the recipe, for messages.

    Raises UserError where it is of another type, or on other linears, or of other ranks than the run's own.
    """
    wanted = planned_adapter(policy)
    assert wanted is not None
    if wanted.spec.residual:
        raise UserError(f"{key}={folder} is on the base, of which init_lora_weights={wanted.init} keeps a part only")
    changed = {"init_adapter": folder, "init_lora_weights": None}
    found = starting_adapter(policy.adapter.model_copy(update=changed), read_base(policy).shapes, policy.model_name)
    assert found.tensors is not None
    theirs, ours = _shapes(found.spec), _shapes(wanted.spec)
    if theirs != ours:
        names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        first = names[0]
        raise UserError(
            f"{key}={folder} is no adapter of the run's shapes, in {len(names)} linears: of {first} it has "
            f"{theirs.get(first, 'nothing')}, the run {ours.get(first, 'nothing')} (segments and rank of each block); "
            "set the recipe's dim, rank_pattern and target_modules to its own, or serve the teacher (teacher.urls)"
        )
    tensors = dict(found.tensors)
    for theirs_of, ours_of in zip(found.spec.modules, wanted.spec.modules, strict=True):
        tensors[f"{theirs_of.name}.lora_B"] = _rescaled(tensors[f"{theirs_of.name}.lora_B"], theirs_of, ours_of)
    return tensors


def _shapes(spec: AdapterSpec) -> dict[str, tuple[tuple[tuple[str, ...], int], ...]]:
    return {module.name: tuple((block.segments, block.rank) for block in module.blocks) for module in spec.modules}


def _rescaled(b: Tensor, theirs: ModuleLayout, ours: ModuleLayout) -> Tensor:
    """B [out, R] with the ratio of the scales in it: the product is as it was."""
    return b if theirs.scales().equal(ours.scales()) else (b.float() * (theirs.scales() / ours.scales())).to(b.dtype)
