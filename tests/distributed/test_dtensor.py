"""The DTensor backend on real ranks, world sizes 1, 2 and 4, against plain transformers + peft and against the Megatron
backend."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megatron_lora.conversion.adapter_checkpoint import read_adapter
from megatron_lora.conversion.export import write_peft_folder
from megatron_lora.lora.peft_format import to_hf
from tests.distributed.dtensor_worker import OTHERS, TRAIN, adam_eps, learning_rate, steps, truth_of
from tests.support.cached_norms import assert_never_stale
from tests.support.compare import largest_difference, relative_differences
from tests.support.config_sweep import assert_honoured
from tests.support.four_bit import save_dequantized
from tests.support.grouped import assert_same_numbers
from tests.support.launch import chosen
from tests.support.models import save_model
from tests.support.reference import (
    TARGETS,
    changes_of,
    cut_logits,
    make_rows,
    of_targets,
    save_adapter,
    token_logps,
    train,
)

# The first test of a world size waits for all of its cases.
pytestmark = pytest.mark.timeout(2700)

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
FAMILIES = ("llama3", "qwen2", "qwen3", "gemma3", "llama_biases")


# Compiling, peft's own DoRA and all fields of all configs take a minute each.
SLOW = {
    "one_saved",
    "sp_saved",
    "pissa_one",
    "one_dora_compiled",
    "one_dora_compiled_recompute",
    "one_dora_peft_forward",
    "norms_one",
    "config_sweep",
    "config_sweep_all",
}


def named(cases: dict[str, Any], start: str = "") -> list[Any]:
    """Parameters of the cases whose names start so; four ranks take a minute of two cores."""
    names = [name for name in cases if name.startswith(start)]
    return [
        pytest.param(name, marks=[pytest.mark.long] if cases[name][0] > 2 or name in SLOW else []) for name in names
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dtensor")
    for family in FAMILIES:
        save_adapter(save_model(folder / family, family), folder / f"{family}_adapter")
    # peft takes names of an MLP for parameters of the experts.
    experts = save_model(folder / "qwen3_moe", "qwen3_moe")
    save_adapter(experts, folder / "qwen3_moe_adapter", targets=TARGETS[:4])
    save_adapter(folder / "llama3", folder / "llama3_head_adapter", targets=[*TARGETS, "lm_head"])
    for family in ("llama3", "qwen2"):
        save_adapter(folder / family, folder / f"{family}_dora_adapter", use_dora=True)
    even = save_model(folder / "qwen3_even", "qwen3_even")
    save_dequantized(even, folder / truth_of("qwen3_even_nf4"))
    save_adapter(even, folder / "qwen3_even_nf4_adapter")
    save_adapter(even, folder / "qwen3_even_nf4_dora_adapter", use_dora=True)
    modules = ["embed_tokens", "input_layernorm", "model.norm", "lm_head"]
    save_adapter(folder / "llama3", folder / "llama3_saved_adapter", modules_to_save=modules)
    _save_unlike_adapter(folder / "llama3", folder / "unlike_adapter")
    return folder


def _save_unlike_adapter(base: Path, folder: Path) -> None:
    """q and v with an A and a rank of their own, some layers only, rsLoRA's scale."""
    torch.manual_seed(4)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2},
        layers_to_transform=[1, 3],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


class Runs:
    """The workers' results; a world size runs its chosen cases once, when first asked for one, the slow ones apart."""

    def __init__(self, folder: Path, chosen: set[str]):
        self.folder = folder
        self.chosen = chosen
        self.logs: dict[tuple[int, bool], str] = {}
        self.references: dict[tuple[str, bool], Any] = {}

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        size, group = self._size(name), (self._size(name), name in SLOW)
        if group not in self.logs:
            self.logs[group] = self._run(*group)
        log = self.logs[group][-6000:]
        paths = [self.folder / f"{name}.rank{rank}.pt" for rank in range(size)]
        missing = [path.name for path in paths if not path.is_file()]
        assert not missing, f"{missing} not written:\n{log}"
        results = [torch.load(path, weights_only=False) for path in paths]
        assert "error" not in results[0], f"{results[0]['error']}\n{log}"
        return results

    def _size(self, name: str) -> int:
        return (TRAIN.get(name) or OTHERS[name])[0]

    def _run(self, size: int, slow: bool) -> str:
        names = [name for name in self.chosen if self._size(name) == size and (name in SLOW) == slow]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += ["-m", "tests.distributed.dtensor_worker", str(self.folder), *names]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    def reference(self, family: str, full: bool) -> Any:
        if (family, full) not in self.references:
            base = self.folder / truth_of(family)
            adapter = None if full else self.folder / f"{family}_adapter"
            self.references[family, full] = train(
                base, adapter, steps(), lr=learning_rate(family, full), eps=adam_eps(family)
            )
        return self.references[family, full]


@pytest.fixture(scope="module")
def runs(folder: Path, request: pytest.FixtureRequest) -> Runs:
    return Runs(folder, chosen(request, [*TRAIN, *OTHERS]))


@pytest.mark.parametrize("name", named(OTHERS, "config_sweep"))
def test_a_field_of_the_config_is_honoured_or_refused(runs: Runs, name: str) -> None:
    [got] = runs[name]
    assert_honoured(got, megatron=False)


@pytest.mark.parametrize("name", named(OTHERS, "shared_"))
def test_shared_prefixes_change_no_number(runs: Runs, name: str) -> None:
    for got in runs[name]:
        assert_same_numbers(got["shared"], got["whole"])


@pytest.mark.parametrize("name", named(TRAIN))
def test_training_equals_transformers_and_peft(runs: Runs, name: str) -> None:
    _, family, options = TRAIN[name]
    full = options.get("full", False)
    wanted = runs.reference(family, full)
    for got in runs[name]:
        assert max(relative_differences(got["losses"], wanted.losses)) < TOLERANCE
        assert max(relative_differences(got["grad_norms"], wanted.grad_norms)) < TOLERANCE
        # AdamW divides by the gradients' size, which carries rounding of near-zero gradients into full steps.
        assert largest_difference(got["weights"], wanted.adapter) < 10 * TOLERANCE
        assert all(in_modules == exported for in_modules, exported in got["fingerprints"])


@pytest.mark.parametrize("name", named(OTHERS, "resume"))
def test_resume_is_bit_identical(runs: Runs, name: str) -> None:
    for got in runs[name]:
        assert got["resumed"]["losses"] == got["straight"]["losses"][3:]
        assert got["resumed"]["grad_norms"] == got["straight"]["grad_norms"][3:]
        for key, value in got["straight"]["weights"].items():
            assert torch.equal(got["resumed"]["weights"][key], value), key


@pytest.mark.parametrize(("name", "saved"), [("tp_to_dp", "resume_tp"), ("dp_full_to_tp", "resume_dp_full")])
def test_checkpoint_goes_on_in_another_layout(runs: Runs, name: str, saved: str) -> None:
    wanted = runs[saved][0]["straight"]
    for got in runs[name]:
        assert max(relative_differences(got["losses"], wanted["losses"][3:])) < 1e-5
        assert max(relative_differences(got["grad_norms"], wanted["grad_norms"][3:])) < TOLERANCE


@pytest.mark.parametrize("name", ["resume_tp"])
def test_adapter_checkpoint_has_the_shared_format(runs: Runs, folder: Path, name: str) -> None:
    saved = runs[name][0]["saved"]
    _, tensors = to_hf(*read_adapter(folder / "saved" / "tp" / "weights"))
    assert set(tensors) == set(saved)
    assert all(torch.equal(tensors[name], value) for name, value in saved.items())


@pytest.mark.parametrize("name", ["scores_one", "scores_tp", "scores_unlike", "scores_unlike_tp"])
def test_scores(runs: Runs, folder: Path, name: str) -> None:
    adapter = folder / ("unlike_adapter" if "unlike" in name else "llama3_adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "llama3", attn_implementation="eager")
    rows = make_rows(5, 101, seed=8)
    with torch.no_grad():
        without = [token_logps(base, row) for row in rows]
        model = PeftModel.from_pretrained(base, adapter)
        adapted = [token_logps(model, row) for row in rows]
        logits = [model(row.input_ids[None]).logits[0, :-1] / 0.5 for row in rows]
        answer = rows[0].input_ids[:5].tolist()
        for _ in range(9):
            answer.append(int(model(torch.tensor([answer])).logits[0, -1].argmax()))
        merged = model.merge_and_unload().state_dict()
    targets = [row.input_ids[1:] for row in rows]
    sharp = [of_targets(values, wanted) for values, wanted in zip(logits, targets, strict=True)]
    cut = [of_targets(cut_logits(v, wanted, 30, 0.6), wanted) for v, wanted in zip(logits, targets, strict=True)]
    assert min(float((c - s).min()) for c, s in zip(cut, sharp, strict=True)) > 0.1
    count = sum(row.num_targets for row in rows)
    loss = -sum(float((logps * row.target_mask[1:]).sum()) for logps, row in zip(adapted, rows, strict=True)) / count
    for got in runs[name]:
        for key, wanted in (
            ("base", without),
            ("adapted", adapted),
            ("sharp", sharp),
            ("cut", cut),
            ("again", adapted),
        ):
            for piece, reference in zip(got[key], wanted, strict=True):
                assert piece[0] == 0.0
                torch.testing.assert_close(piece[1:], reference, rtol=1e-4, atol=1e-5)
        assert got["loss"] == pytest.approx(loss, rel=1e-5)
        assert got["answer"] == answer[5:] and got["ended"] == answer[5 : 6 + answer[5:].index(answer[8])]
        assert got["poisoned"] == "the log-probability of a token is nan for data rows [5, 6, 7, 8, 9]"
        assert set(got["merged"]) == set(merged)
        for key, value in merged.items():
            torch.testing.assert_close(got["merged"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", named(OTHERS, "pissa"))
def test_an_adapter_of_the_residual_is_pefts_own(runs: Runs, folder: Path, name: str, tmp_path: Path) -> None:
    fresh = {"init_lora_weights": "pissa"}
    wanted = train(folder / "llama3", None, steps(), lr=learning_rate("llama3", False), share_a=False, fresh=fresh)
    rows = make_rows(5, 101, seed=8)
    for number, got in enumerate(runs[name]):
        assert max(relative_differences(got["losses"], wanted.losses)) < TOLERANCE
        assert max(relative_differences(got["grad_norms"], wanted.grad_norms)) < TOLERANCE
        assert largest_difference(changes_of(got["config"], got["weights"]), wanted.adapter) < 10 * TOLERANCE
        assert all(in_modules == exported for in_modules, exported in got["fingerprints"])
        base: Any = AutoModelForCausalLM.from_pretrained(folder / "llama3", attn_implementation="eager")
        merged: Any = AutoModelForCausalLM.from_pretrained(folder / "llama3", attn_implementation="eager")
        merged.load_state_dict(got["merged"])
        write_peft_folder(tmp_path / str(number), got["config"], got["weights"])
        with torch.no_grad():
            for row, start, reference in zip(rows, got["start"], got["reference"], strict=True):
                assert (token_logps(base, row) - start[1:]).abs().max() < TOLERANCE
                assert torch.equal(start, reference)
            adapted = PeftModel.from_pretrained(base, tmp_path / str(number))
            for row, scores in zip(rows, got["adapted"], strict=True):
                assert (token_logps(adapted, row) - scores[1:]).abs().max() < TOLERANCE
                assert (token_logps(merged, row) - scores[1:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", named(OTHERS, "norms"))
def test_norms_are_kept_until_the_factors_change(runs: Runs, name: str) -> None:
    for got in runs[name]:
        assert_never_stale(kept=got["True"], anew=got["False"])


@pytest.mark.parametrize("name", named(OTHERS, "dropout"))
def test_dropout(runs: Runs, name: str) -> None:
    for got in runs[name]:
        # Recomputation draws the masks again.
        assert max(relative_differences(got["recomputed"]["losses"], got["kept"]["losses"])) < 1e-5
        assert max(relative_differences(got["recomputed"]["grad_norms"], got["kept"]["grad_norms"])) < 1e-5
        evaluated, trained = got["evaluated"], got["trained"]
        assert evaluated[0] == evaluated[1]
        assert abs(trained[0] - evaluated[0]) > 1e-4 * evaluated[0]


def test_ranks_agree_on_the_gradient_under_dropout(runs: Runs) -> None:
    for name in ("dropout_tp_pre", "dropout_tp_post"):
        first, second = runs[name]
        for key, value in first["kept"]["weights"].items():
            assert torch.equal(second["kept"]["weights"][key], value), (name, key)


@pytest.mark.parametrize("name", ["compiled"])
def test_compiled_layers_give_the_same_numbers(runs: Runs, name: str) -> None:
    wanted = runs.reference("qwen3", False)
    [got] = runs[name]
    assert max(relative_differences(got["losses"], wanted.losses[:3])) < TOLERANCE
    assert max(relative_differences(got["grad_norms"], wanted.grad_norms[:3])) < TOLERANCE


@pytest.mark.parametrize(("name", "full"), [("bfloat16", False), ("bfloat16_full", True), ("bfloat16_tp", False)])
def test_bfloat16_trains_fp32_weights(runs: Runs, name: str, full: bool) -> None:
    wanted = runs.reference("qwen3", full)
    for got in runs[name]:
        assert got["dtypes"] == ["torch.float32"]
        assert max(relative_differences(got["losses"], wanted.losses)) < 3e-2
        assert max(relative_differences(got["grad_norms"], wanted.grad_norms)) < 1e-1


@pytest.mark.parametrize("name", ["named_optimizer"])
def test_torch_optimizer_and_schedulers(runs: Runs, folder: Path, name: str) -> None:
    [got] = runs[name]
    assert got["learning_rates"] == pytest.approx([1e-3, 3.25e-3, 5.5e-3, 7.75e-3, 1e-2, 1e-2])
    base, adapter = folder / "llama3", folder / "llama3_adapter"
    first = train(base, adapter, steps()[:2], lr=1e-3)
    assert max(relative_differences(got["losses"][:2], first.losses)) < TOLERANCE
