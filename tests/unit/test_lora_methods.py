"""Kinds of adapters: each beside peft's own linear, and what a recipe plans of them."""

from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from megatron_lora.config.schema_adapters import AdapterType, PeftConfig
from megatron_lora.config.schema_adapters import LoraConfig as DTensorAdapter
from megatron_lora.errors import UserError
from megatron_lora.lora import base_weight, init
from megatron_lora.lora.arithmetic import AdapterCall, TensorParallel
from megatron_lora.lora.base_weight import DenseWeight
from megatron_lora.lora.describe import describe
from megatron_lora.lora.init import initial_factors
from megatron_lora.lora.layout import FACTORS_OF_TYPE, AdapterSpec, module_name
from megatron_lora.lora.merge import WeightUpdate
from megatron_lora.lora.methods import METHODS, dora, method_of
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.peft_format import hf_linears
from megatron_lora.policy.adapter_start import starting_adapter

ALONE = TensorParallel(group=None, size=1, rank=0, sequence_parallel=False)
SHAPES = describe(ModelSizes("llama", 16, 24, 2, 4, 2, 4, 20, False))
FUSED_ROWS = 12


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, FUSED_ROWS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def peft_linear(**settings: Any) -> Any:
    """peft's own module around one linear, its factors away from where they start."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["linear"], **settings)
    model = get_peft_model(OneLinear(), config)  # type: ignore[arg-type]
    layer: Any = model.base_model.model.linear
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1) if "magnitude" in name else parameter.normal_()
    return layer.double()


def factors_of(layer: Any) -> dict[str, nn.Parameter]:
    found = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", {}), ("dora", {"use_dora": True}), ("lora", {"use_rslora": True})]
)
@pytest.mark.parametrize("parallel", ["column", "row"])
def test_output_and_gradients_are_pefts(kind: str, settings: dict[str, Any], parallel: str) -> None:
    layer, method = peft_linear(**settings), method_of(kind)
    base = layer.base_layer
    x, dy = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, FUSED_ROWS, dtype=torch.float64)
    theirs = x.clone().requires_grad_()
    wanted = layer(theirs)
    wanted.backward(dy)
    gradients = {key: factor.grad for key, factor in factors_of(layer).items()}
    values: Any = {key: factor.detach().clone().requires_grad_() for key, factor in factors_of(layer).items()}
    ours, call = x.clone().requires_grad_(), AdapterCall(ALONE, layer.scaling["default"])
    derived = method.derive(DenseWeight(base.weight), values, call.scale, None)
    if parallel == "column":
        y = method.column(ours, DenseWeight(base.weight), base.bias, values, derived, call)
    else:
        y = method.row(ours, DenseWeight(base.weight), values, derived, call) + base.bias
    y.backward(dy)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    for key, value in values.items():
        torch.testing.assert_close(value.grad, gradients[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(("kind", "settings"), [("lora", {}), ("dora", {"use_dora": True})])
def test_merging_is_pefts(kind: str, settings: dict[str, Any]) -> None:
    layer = peft_linear(**settings)
    weight = layer.base_layer.weight.detach().clone()
    values: Any = {key: factor.detach() for key, factor in factors_of(layer).items()}
    update = WeightUpdate(AdapterSpec("base", SHAPES, [], type=kind), values, layer.scaling["default"])
    by_rows = torch.cat([update.of_rows(weight, slice(start, start + 5)) for start in (0, 5, 10)])
    layer.merge()
    wanted = layer.base_layer.weight
    torch.testing.assert_close(update.merged(weight), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight + by_rows, wanted, rtol=1e-5, atol=1e-5)


def test_norms_in_pieces_are_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, b = torch.randn(7, 5), torch.randn(2, 5), torch.randn(7, 2)
    monkeypatch.setattr(base_weight, "CHUNK_ELEMENTS", 10)
    torch.testing.assert_close(dora.row_norms(DenseWeight(weight), a, b), (weight + b @ a).norm(dim=1))


def test_rows_that_no_block_serves_stay_the_bases_and_padding_has_no_gradient() -> None:
    method = method_of("dora")
    weight = torch.randn(4, 3)
    weight[3] = 0
    magnitude = torch.tensor([2.0, 0.0, 3.0, 0.0], requires_grad=True)
    values: Any = {"A": torch.randn(2, 3), "B": torch.zeros(4, 2), "magnitude": magnitude}
    derived = method.derive(DenseWeight(weight), values, 1.0, None)
    x = torch.randn(2, 3)
    y = method.column(x, DenseWeight(weight), None, values, derived, AdapterCall(ALONE, 1.0))
    y.sum().backward()
    torch.testing.assert_close(y[:, 1], x @ weight[1])
    assert magnitude.grad is not None and magnitude.grad[1] == 0 and magnitude.grad[3] == 0
    assert magnitude.grad[0] != 0


def plan(**settings: Any) -> AdapterSpec:
    return starting_adapter(PeftConfig(enabled=True, dim=4, alpha=8, **settings), SHAPES, "no/such-folder").spec


def test_canonical_gives_each_linear_an_a_of_its_own() -> None:
    spec = plan(type="canonical_lora")
    qkv = spec.modules[0]
    assert [(block.segments, block.rank) for block in qkv.blocks] == [(("q",), 4), (("k",), 4), (("v",), 4)]
    assert qkv.rank == 12 and spec.type == "lora"
    drawn = initial_factors(spec, "xavier", "zero", seed=1)(qkv)
    shape = (4, SHAPES.hidden_size)
    name = f"{qkv.name}.lora_A.k"
    assert torch.equal(drawn["lora_A"][4:8], init.init_factor("xavier", shape, 1, name))


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    spec = plan(use_rslora=True)
    assert {block.scale for module in spec.modules for block in module.blocks} == {8 / 4**0.5}


def test_patterns_name_linears_as_targets_do() -> None:
    spec = plan(rank_pattern={"v_proj": 2, "*.layers.1.*": 6}, alpha_pattern={"linear_fc2": 16})
    by_name = {module.name: module for module in spec.modules}
    first, second = (by_name[f"decoder.layers.{layer}.self_attention.linear_qkv"] for layer in (0, 1))
    assert [(block.segments, block.rank) for block in first.blocks] == [(("q", "k"), 4), (("v",), 2)]
    assert [(block.segments, block.rank) for block in second.blocks] == [(("q", "k"), 6), (("v",), 2)]
    down = by_name["decoder.layers.0.mlp.linear_fc2"].blocks[0]
    assert (down.alpha, down.scale) == (16.0, 4.0)


def test_patterns_are_read_as_peft_reads_them_too() -> None:
    """Where no name, path or wildcard fits: a regular expression for the end of a name."""
    ranks = {r"^model\.layers\.0\..*(q|k)_proj": 2, r"layers\.1\..*up_proj": 6}
    found = {
        linear.name: block.rank
        for module in plan(rank_pattern=ranks).modules
        for linear in hf_linears(SHAPES).values()
        for block in module.blocks
        if linear.segment in block.segments and module.name == module_name(linear.kind, linear.layer)
    }
    other = {name: rank for name, rank in found.items() if rank != 4}
    assert other == {f"model.layers.0.self_attn.{name}_proj": 2 for name in "qk"} | {"model.layers.1.mlp.up_proj": 6}
    with pytest.raises(UserError, match="matches no linear"):
        plan(rank_pattern={"(q_proj": 2})


@pytest.mark.parametrize("config", [PeftConfig, DTensorAdapter])
def test_a_pattern_for_no_adapted_linear_is_refused(config: Any) -> None:
    options = {"enabled": True, "target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2}}
    if config is DTensorAdapter:
        options["match_all_linear"] = False
    with pytest.raises(UserError, match=r"'down_proj' in policy\..*rank_pattern names no linear that has an adapter"):
        starting_adapter(config(**options), SHAPES, "no/such-folder")


def test_dora_starts_at_the_norms_of_base_and_update() -> None:
    spec = plan(type="dora", target_modules=["q_proj", "v_proj"])
    module = spec.modules[0]
    weights = {
        f"model.layers.0.self_attn.{leaf}_proj.weight": torch.randn(rows, 16) for leaf, rows in (("q", 16), ("v", 8))
    }
    drawn = initial_factors(spec, "xavier", "zero", 1, weights.__getitem__)(module)
    # Of each of the two groups: q's 8 rows, k's 4, which have no adapter, v's 4.
    rows = drawn["magnitude"].view(2, 16)
    torch.testing.assert_close(rows[:, :8].reshape(-1), weights["model.layers.0.self_attn.q_proj.weight"].norm(dim=1))
    torch.testing.assert_close(rows[:, 12:].reshape(-1), weights["model.layers.0.self_attn.v_proj.weight"].norm(dim=1))
    assert not rows[:, 8:12].any()
    assert spec.num_parameters(module) == 4 * 16 + 24 * 4 + 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "dora", "a2a_experimental": True}, "a2a_experimental"),
        ({"lora_plus_ratio": 0.5}, "lora_plus_ratio"),
        ({"type": "lokr"}, "canonical_lora"),
        ({"type": "QLoRA"}, "QLoRA is not a kind of its own here; set type=lora with quantization=nf4"),
        ({"type": "lora+"}, "set type=lora with lora_plus_ratio"),
        ({"init_lora_weights": "olora"}, "wanted pissa, pissa_niter_N"),
        ({"bias": "lora_only"}, "trained biases are not there"),
    ],
)
def test_what_a_kind_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeftConfig(enabled=True, **options)


def test_the_recipe_knows_the_kinds_that_are_there() -> None:
    assert set(get_args(AdapterType)) == set(METHODS)
    assert {method.type for method in METHODS.values()} == set(FACTORS_OF_TYPE)
