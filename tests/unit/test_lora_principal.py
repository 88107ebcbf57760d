"""PiSSA: where it starts, beside peft's own, and what it is against the base itself."""

from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from megatron_lora.config.schema_adapters import LoraConfig, PeftConfig
from megatron_lora.conversion.adapter_checkpoint import read_start, write_start
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.merge import merge_targets
from megatron_lora.lora.peft_format import hf_linears, segment_features, to_hf
from megatron_lora.lora.peft_reading import from_hf
from megatron_lora.policy.adapter_start import DrawnStart, draw_start, starting_adapter
from tests.unit.test_lora_methods import SHAPES


class Weights(dict):
    """A base in memory."""

    read = dict.__getitem__


def drawn(**options: Any) -> tuple[dict[str, torch.Tensor], AdapterSpec, DrawnStart]:
    """(the base's weights by HF name, the adapter, its start) of a recipe with `init_lora_weights`."""
    generator = torch.Generator().manual_seed(3)
    base = {
        f"{name}.weight": torch.randn(segment_features(linear, SHAPES)[::-1], generator=generator)
        for name, linear in hf_linears(SHAPES).items()
    }
    config = PeftConfig(**{"enabled": True, "dim": 4, "alpha": 12, "init_lora_weights": "pissa"} | options)
    start = starting_adapter(config, SHAPES, "no/such-folder")
    source: Any = Weights(base)
    return base, start.spec, draw_start(start, ("xavier", "zero"), 5, torch.float32, source, torch.float32)


def fused(spec: AdapterSpec, start: DrawnStart) -> dict[str, torch.Tensor]:
    return {f"{module.name}.{key}": v for module in spec.modules for key, v in start.factors(module).items()}


def rest(base: dict[str, torch.Tensor], start: DrawnStart) -> Any:
    assert start.changed_base is not None
    return start.changed_base(base.__getitem__)


@pytest.mark.parametrize(("init", "rslora"), [("pissa", False), ("pissa", True), ("pissa_niter_200", False)])
def test_the_start_is_pefts(init: str, rslora: bool) -> None:
    options = {"type": "canonical_lora", "init_lora_weights": init, "use_rslora": rslora}
    base, spec, start = drawn(**options)
    tensors = to_hf(spec, fused(spec, start))[1]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = base[f"{name}.weight"]
        model: Any = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
        model[0].weight.data = weight.clone()
        theirs = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights="pissa", use_rslora=rslora)
        wanted: Any = peft.get_peft_model(model, theirs).base_model.model[0]
        b, a = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "BA")
        product = wanted.lora_B["default"].weight @ wanted.lora_A["default"].weight
        torch.testing.assert_close(b @ a, product, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.abs(), wanted.lora_A["default"].weight.abs(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(rest(base, start)(f"{name}.weight"), wanted.base_layer.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "canonical_lora", "dora"])
def test_the_model_starts_as_the_base(kind: str) -> None:
    base, spec, start = drawn(type=kind)
    read, factors = rest(base, start), fused(spec, start)
    for name, target in merge_targets(spec).items():
        weight = read(f"{name}.weight")
        assert weight.norm() < base[f"{name}.weight"].norm()
        merged = target.weight_update(factors).merged(weight)
        torch.testing.assert_close(merged, base[f"{name}.weight"], rtol=1e-4, atol=1e-5)
    assert read("lm_head.weight") is base["lm_head.weight"]


@pytest.mark.parametrize("options", [{}, {"type": "dora"}, {"type": "canonical_lora", "use_rslora": True}])
def test_what_is_trained_is_an_adapter_of_the_base(options: dict[str, Any]) -> None:
    from megatron_lora.lora.principal import against_the_base

    base, spec, start = drawn(**options)
    names = [module.name for module in spec.modules]
    torch.manual_seed(0)
    trained = {name: value + 0.1 * torch.randn_like(value) for name, value in fused(spec, start).items()}
    masks = {module.name: module.b_mask(SHAPES) for module in spec.modules}
    for name, mask in masks.items():
        if mask is not None:
            trained[f"{name}.lora_B"] *= mask
    plain, tensors = against_the_base(spec, trained, start.principal_of(names))
    # As a stock peft reads it.
    again, read = from_hf(*to_hf(plain, tensors), SHAPES, "base")
    assert all(block.rank == 8 for module in again.modules for block in module.blocks)
    residual = rest(base, start)
    for name, target in merge_targets(spec).items():
        key = f"{name}.weight"
        wanted = target.weight_update(trained).merged(residual(key))
        found = merge_targets(again)[name].weight_update(read).merged(base[key])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_start_of_a_checkpoint_is_of_its_adapter(tmp_path: Any) -> None:
    _, spec, start = drawn()
    principal = start.principal_of([module.name for module in spec.modules])
    write_start(tmp_path, principal)
    assert all(torch.equal(value, principal[name]) for name, value in read_start(tmp_path, spec).items())
    other = drawn(dim=2)[1]
    with pytest.raises(UserError, match="is not of the adapter"):
        read_start(tmp_path, other)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="has 8 singular values, the adapter's rank is 9; set dim to 8 or less"):
        options = {"type": "canonical_lora", "dim": 9, "target_modules": ["v_proj"]}
        starting_adapter(PeftConfig(enabled=True, init_lora_weights="pissa", **options), SHAPES, "no/such-folder")
    for config in (PeftConfig, LoraConfig):
        with pytest.raises(ValidationError, match="keep one of the two"):
            config(enabled=True, init_lora_weights="pissa", init_adapter="folder")
        with pytest.raises(ValidationError, match="init_lora_weights"):
            config(enabled=True, init_lora_weights="olora")
        with pytest.raises(ValidationError, match="holds them in 4 bits, where the change would be lost"):
            config(enabled=True, init_lora_weights="pissa", quantization="nf4", lora_dtype="float32")
