"""Mamba hybrids (Nemotron-H): the recurrence, the order of in_proj's rows, names in files, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.config_gate import check_config
from megatron_lora.conversion.export import export_lora_adapter_to_hf, import_hf_adapter, merge_lora_to_hf
from megatron_lora.conversion.hf_model import HFModel
from megatron_lora.conversion.inventory import open_model
from megatron_lora.conversion.whole_model import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_lora.errors import UserError
from megatron_lora.lora.describe import describe_config, describe_json
from megatron_lora.lora.layout import rows_of_part
from megatron_lora.lora.targets import select_linears
from megatron_lora.policy.layout_checks import check_layout
from megatron_lora.policy.row_grid import KeptGrid, packed_grid
from megatron_lora.policy.state_space import scan
from megatron_lora.rollout.engines import ENGINES
from megatron_lora.runtime.world import World
from tests.support.models import family_config, random_model
from tests.support.reference import MAMBA_TARGETS

FILE = "model.safetensors"
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    random_model(family_config("nemotron_h")).save_pretrained(folder)
    return folder


def shapes(**changes: Any) -> Any:
    return describe_config(family_config("nemotron_h", **changes).to_dict())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def policy(folder: Path | str = "somewhere", **megatron: Any) -> PolicyConfig:
    section = {"enabled": True, "peft": {"enabled": True}} | megatron
    sizes = {"model_name": str(folder), "max_total_sequence_length": 128}
    return PolicyConfig.model_validate(sizes | {"megatron_cfg": section})


def test_layers_of_a_micro_batch_share_one_grid() -> None:
    bounds, kept = torch.tensor([0, 3, 5]), KeptGrid()
    grid = kept.of(bounds, 7)  # two tokens of filling
    assert kept.of(bounds, 7) is grid and KeptGrid().of(bounds, 7) is not grid
    assert grid.places.tolist() == packed_grid(bounds, 7).places.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(AssertionError):
        kept.of(bounds, 8)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_the_chunked_scan_is_the_recurrence(tokens: int, begun: bool) -> None:
    """One token after the other, in fp64; lengths within a chunk, of one chunk, and of a part of the third. begun: from
    a state that is not empty."""
    torch.manual_seed(0)
    rows, groups, heads, features, state = 2, 2, 3, 5, 4
    x = torch.randn(rows, tokens, groups, heads, features, dtype=torch.float64)
    log_decay = -torch.rand(rows, tokens, groups, heads, dtype=torch.float64)
    b, c = torch.randn(2, rows, tokens, groups, state, dtype=torch.float64)
    states, wanted = torch.zeros(rows, groups, heads, features, state, dtype=torch.float64), []
    start = states.normal_().clone() if begun else None
    for t in range(tokens):
        states = states * log_decay[:, t, ..., None, None].exp()
        states = states + x[:, t, ..., None] * b[:, t, :, None, None, :]
        wanted.append((states * c[:, t, :, None, None, :]).sum(-1))
    found, last = scan(x, log_decay, b, c, start, chunk=4)
    assert torch.allclose(found, torch.stack(wanted, 1), atol=1e-12) and torch.allclose(last, states, atol=1e-12)


def test_rows_of_in_proj_lie_group_by_group() -> None:
    linear = shapes().linear("in_proj")
    values, states, heads = 40, 6, 4  # of a group
    blocks = [values, values, states, states, heads]
    numbers = torch.arange(linear.out_features).split([2 * size for size in blocks])
    first = torch.cat([block[:size] for block, size in zip(numbers, blocks, strict=True)])
    second = torch.cat([block[size:] for block, size in zip(numbers, blocks, strict=True)])
    fused = torch.full((linear.out_features,), -1)
    fused[rows_of_part(linear, "in")] = torch.arange(linear.out_features)
    assert torch.equal(fused, torch.cat([first, second]))
    # Of two ranks each has a group.
    assert linear.on_rank(2).out_features == len(first) and linear.on_rank(2).parts[0].blocks == tuple(blocks)


def test_each_layer_has_what_it_is() -> None:
    found = shapes()
    where = {kind: found.linear(kind).layers for kind in found.kinds[:-1]}
    assert where["in_proj"] == where["out_proj"] == (0, 3) and where["linear_qkv"] == (1, 5)
    assert where["linear_fc1"] == (2,) and where["experts.linear_fc1"] == where["shared_experts.linear_fc2"] == (4,)
    assert describe_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize("published", [True, False])
def test_there_and_back(base: Path, published: bool, tmp_path: Path) -> None:
    """published: the files as the model's makers name them; transformers names the embedding otherwise."""
    folder, again = base, tmp_path / "again"
    if published:
        folder = tmp_path / "published"
        folder.mkdir()
        (folder / "config.json").symlink_to(base / "config.json")
        tensors = load_file(base / FILE)
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
        tensors["mtp.layers.0.norm.weight"] = torch.ones(4)
        save_file(tensors, folder / FILE, {"format": "pt"})
    checkpoint = str(tmp_path / "megatron")
    convert_hf_to_megatron(hf_model_name=str(folder), megatron_ckpt_path=checkpoint, show_progress=False)
    convert_megatron_to_hf(megatron_ckpt_path=checkpoint, hf_ckpt_path=str(again), show_progress=False)
    first, second = load_file(folder / FILE), load_file(again / FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(place)) for place in (base, again)))


def test_an_adapter_goes_to_peft_and_into_the_weights(base: Path, tmp_path: Path) -> None:
    theirs, checkpoint, ours = (tmp_path / name for name in ("theirs", "checkpoint", "ours"))
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, lora_alpha=6, target_modules=MAMBA_TARGETS)
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(theirs))
    import_hf_adapter(hf_adapter=str(theirs), adapter_ckpt_path=str(checkpoint), hf_model_name=str(base))
    export_lora_adapter_to_hf(adapter_ckpt=str(checkpoint), hf_ckpt_path=str(ours))
    file = "adapter_model.safetensors"
    first, second = load_file(theirs / file), load_file(ours / file)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any("layers.0.mixer.in_proj" in name for name in first)
    wanted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(ours)))
    merged = tmp_path / "merged"
    merge_lora_to_hf(
        adapter_ckpt=str(checkpoint),
        hf_ckpt_path=str(merged),
        base_ckpt=str(base),
        check_logits=True,
        show_progress=False,
    )
    assert load_file(merged / FILE).keys() == load_file(base / FILE).keys()
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - wanted).abs().max() < 1e-4
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max() > 0.1


def test_out_proj_is_adapted_where_it_is_named() -> None:
    """peft does not load it. NeMo RL's recipe of Nemotron 3 Nano excludes `*out_proj*`."""
    for excluded in ([], ["*out_proj*"]):
        found = select_linears(shapes(), [], excluded, key="x", naming="megatron")
        kinds = {linear.kind for linear in found.linears}
        assert {"in_proj", "linear_qkv", "linear_fc1", "shared_experts.linear_fc1"} <= kinds and "out_proj" not in kinds
    found = select_linears(shapes(), ["out_proj"], [], key="x", naming="megatron")
    assert {linear.kind for linear in found.linears} == {"out_proj"} and "PEFT does not load" in found.notices[-1]


def test_a_folder_without_its_embedding(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(base / "config.json")
    save_file({"model.embed_tokens.weight": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(UserError, match=r"no embeddings.weight or embedding.weight below backbone. or model."):
        open_model(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_block_type": ["mamba", "mlp"]}, "layers_block_type has no attention"),
        ({"n_groups": 3}, "n_groups=3 does not divide mamba_num_heads=8"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act='gelu'"),
        ({"time_step_limit": [0.01, 1.0]}, "time_step_limit=.*0.01, 1.0"),
        ({"use_conv_bias": False}, "use_conv_bias=False"),
        ({"mlp_bias": True}, "attention_bias or mlp_bias is true"),
        ({"moe_latent_size": 16}, "moe_latent_size=16: experts work on the model's features"),
        ({"use_bias": True}, "use_bias=True"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    model = HFModel("folder", {}, family_config("nemotron_h", **changes))
    with pytest.raises(UserError, match=words):
        check_config(model, megatron=True, max_length=32)


@pytest.mark.parametrize(
    ("megatron", "ranks", "words"),
    [
        ({"context_parallel_size": 4}, 4, "=4 does not divide the 2 groups of Mamba layers of a rank; use 1 or 2"),
        ({"tensor_model_parallel_size": 4}, 4, "=4 does not divide the 2 groups of Mamba layers"),
    ],
)
def test_layouts_that_are_refused(megatron: dict[str, Any], ranks: int, words: str) -> None:
    dense = shapes(num_key_value_heads=4, layers_block_type=["mamba", "attention", "mlp"])
    with pytest.raises(UserError, match=words):
        check_layout(policy(**megatron), dense, ranks)


def test_on_the_other_backend_ranks_hold_whole_mixers() -> None:
    section = {"tensor_parallel_size": 2, "lora_cfg": {"enabled": True}}
    recipe = PolicyConfig.model_validate({"model_name": "somewhere", "dtensor_cfg": section})
    with pytest.raises(UserError, match=r"tensor_parallel_size=2: .* plan for Mamba layers \(nemotron_h\); use 1"):
        check_layout(recipe, shapes(), 2)


def test_rollouts(base: Path) -> None:
    """vLLM is given merged weights, on a GPU; the training model answers on whatever it trains."""
    pytest.importorskip("vllm")
    world = World.alone()
    for engine in ("vllm", "megatron"):
        ENGINES[engine].check(policy(base), world)
    assert ENGINES["vllm"].merge_only_reason(policy(base), world) == (
        "vLLM was not seen to apply an adapter to a model with Mamba layers"
    )
    if not torch.cuda.is_available():
        [line] = ENGINES["vllm"].not_ready(policy(base), World.alone())
        assert "kernels for Mamba layers" in line and "backend=megatron" in line
    with pytest.raises(UserError, match="kernels for Mamba layers .* run on a GPU alone"):  # of a run, before loading
        ENGINES["vllm"].check_outside(policy(base), world)
    ENGINES["megatron"].check_outside(policy(base), world)
