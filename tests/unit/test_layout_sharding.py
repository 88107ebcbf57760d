"""Rows of segments, block masks and tensor-parallel slices of adapter factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe, describe_config
from megatron_lora.lora.layout import (
    AdapterSpec,
    Block,
    ModelSpec,
    ModuleLayout,
    build_layout,
    features,
    module_name,
    segment_rows,
    segments_of,
)
from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.lora.sharding import shard, unshard


@st.composite
def model_shapes(draw) -> tuple[ModelSpec, int]:
    """Random GQA shapes and a TP size that divides them."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp_size * draw(st.integers(1, 3))
    shapes = describe(
        ModelSizes(
            model_type="llama",
            hidden_size=tp_size * draw(st.integers(1, 4)),
            ffn_hidden_size=tp_size * draw(st.integers(1, 5)),
            num_layers=1,
            num_attention_heads=groups * draw(st.integers(1, 4)),
            num_query_groups=groups,
            head_dim=draw(st.sampled_from([1, 2, 4])),
            vocab_size=draw(st.integers(1, 17)),
            tied_embeddings=False,
            gated=draw(st.booleans()),
        )
    )
    return shapes, tp_size


SHAPES = describe(ModelSizes("llama", 8, 6, 2, 4, 2, 3, 7, False))


def test_qkv_rows_are_interleaved_by_query_group():
    # 2 groups of (2 query heads, key, value), head_dim 3: rows 0-5 q, 6-8 k, 9-11 v, then 12-17 q, 18-20 k, 21-23 v.
    assert segment_rows("linear_qkv", SHAPES, "q").tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert segment_rows("linear_qkv", SHAPES, "k").tolist() == [6, 7, 8, 18, 19, 20]
    assert segment_rows("linear_qkv", SHAPES, "v").tolist() == [9, 10, 11, 21, 22, 23]


def test_fc1_rows_are_gate_then_up_and_a_rank_holds_its_part_of_each():
    assert segment_rows("linear_fc1", SHAPES, "up").tolist() == [6, 7, 8, 9, 10, 11]
    full = torch.arange(12.0)[:, None]
    assert shard(full, "B", "linear_fc1", 1, 2, SHAPES)[:, 0].tolist() == [3, 4, 5, 9, 10, 11]


def test_output_layer_slices_hold_the_padding_as_zeros():
    full = torch.arange(1.0, 8.0)[:, None]
    slices = [shard(full, "B", "output_layer", rank, 2, SHAPES, padded_vocab_size=16) for rank in range(2)]
    assert slices[0][:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert slices[1].tolist() == [[0.0]] * 8
    assert torch.equal(unshard(slices, "B", "output_layer", SHAPES), full)


@settings(deadline=None, max_examples=60)
@given(drawn=model_shapes(), rank=st.integers(1, 5), a2a=st.booleans(), padding=st.integers(0, 9))
def test_unshard_of_shard_is_the_identity(drawn, rank, a2a, padding):
    shapes, tp_size = drawn
    for kind in shapes.kinds:
        inputs, outputs = features(kind, shapes)
        padded = -(-(shapes.vocab_size + padding) // tp_size) * tp_size
        for factor, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
            full = torch.randn(size)
            slices = [shard(full, factor, kind, i, tp_size, shapes, a2a, padded) for i in range(tp_size)]
            assert torch.equal(unshard(slices, factor, kind, shapes, a2a), full)


@settings(deadline=None, max_examples=40)
@given(drawn=model_shapes())
def test_segments_partition_the_rows(drawn):
    shapes, _ = drawn
    for kind in shapes.kinds:
        rows = torch.cat([segment_rows(kind, shapes, segment) for segment in segments_of(kind, shapes)])
        assert torch.equal(rows.sort().values, torch.arange(features(kind, shapes)[1]))


def test_sharded_product_equals_the_full_one_for_every_linear():
    """The split must be W's own: slices of W and of s B A, taken alike, still add up to one merged matrix."""
    torch.manual_seed(0)
    for kind in SHAPES.kinds:
        inputs, outputs = features(kind, SHAPES)
        a, b = torch.randn(3, inputs), torch.randn(outputs, 3)
        parts = [
            (shard(a, "A", kind, rank, 2, SHAPES), shard(b, "B", kind, rank, 2, SHAPES, padded_vocab_size=8))
            for rank in range(2)
        ]
        if kind in ("linear_proj", "linear_fc2"):
            assert torch.allclose(torch.cat([part_b @ part_a for part_a, part_b in parts], dim=1), b @ a)
        else:
            assert torch.allclose(unshard([part_b @ part_a for part_a, part_b in parts], "B", kind, SHAPES), b @ a)


def test_a_tp_size_that_does_not_divide_is_refused_with_what_would():
    with pytest.raises(UserError, match="tensor_model_parallel_size=3 .* 2 query groups; use one of 1, 2"):
        shard(torch.zeros(24, 1), "B", "linear_qkv", 0, 3, SHAPES)


def test_blocks_give_scales_and_mask():
    blocks = (Block.build(("q",), 0, 2, 4), Block.build(("v",), 2, 1, 3, use_rslora=True))
    module = ModuleLayout("decoder.layers.0.self_attention.linear_qkv", "linear_qkv", blocks)
    assert module.rank == 3 and module.layer == 0
    assert module.scales().tolist() == [2.0, 2.0, 3.0]
    mask = module.b_mask(SHAPES)
    assert mask is not None
    assert mask[:, 0].nonzero()[:, 0].tolist() == segment_rows("linear_qkv", SHAPES, "q").tolist()
    assert mask[:, 2].nonzero()[:, 0].tolist() == segment_rows("linear_qkv", SHAPES, "v").tolist()
    assert build_layout("output_layer", 4, 8, SHAPES).b_mask(SHAPES) is None


@pytest.mark.parametrize("rank, alpha", [(0, 1), (4, 0), (4, float("nan"))])
def test_a_block_that_could_not_act_is_refused(rank, alpha):
    with pytest.raises(UserError):
        Block.build(("q",), 0, rank, alpha)


def test_spec_survives_its_file(tmp_path):
    modules = [
        build_layout(module_name(kind, None if kind == "output_layer" else 1), 4, 6, SHAPES) for kind in SHAPES.kinds
    ]
    spec = AdapterSpec("some/model", SHAPES, modules, "abc", {"dim": 4, "alpha": 6})
    spec.save(tmp_path / "adapter.json")
    assert AdapterSpec.load(tmp_path / "adapter.json") == spec
    assert spec.factor_shapes()["decoder.layers.1.mlp.linear_fc1.lora_B"] == (12, 4)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda content: content.update(version=99), "version 99"),
        (lambda content: content.update(type="lokr"), "type 'lokr'"),
        (lambda content: content.update(format="other"), "does not describe"),
        (lambda content: content.pop("modules"), "damaged"),
    ],
)
def test_a_spec_of_another_kind_is_refused(edit, message):
    content = AdapterSpec("m", SHAPES, []).to_json()
    edit(content)
    with pytest.raises(UserError, match=message):
        AdapterSpec.from_json(content)


def test_shapes_from_a_config_of_another_family_are_refused():
    with pytest.raises(UserError, match="model_type='phi3'"):
        describe_config({"model_type": "phi3"})
    with pytest.raises(UserError, match="no 'vocab_size'"):
        describe_config(
            {
                "model_type": "llama",
                "num_attention_heads": 2,
                "hidden_size": 4,
                "intermediate_size": 4,
                "num_hidden_layers": 1,
            }
        )
