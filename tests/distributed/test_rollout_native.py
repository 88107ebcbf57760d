"""Native generation on real ranks against transformers + peft `generate`, and its log-probabilities against the
trainer's, in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_lora.rollout.generator import Sample
from tests.distributed.native_worker import generator_samples, prompts, stop_options, tokenizer
from tests.support.launch import chosen, run_ranks
from tests.support.models import save_model
from tests.support.reference import TARGETS, save_adapter

# The first test of a world size waits for all of its cases.
pytestmark = pytest.mark.timeout(2700)

FAMILIES = ("llama3", "qwen2", "qwen3", "gemma3", "gemma3_softcap")
ONE = {
    "one": {"family": "qwen3", "layout": {}, "stops": True, "trains": True, "refuses": True},
    "gemma": {"family": "gemma3_softcap", "layout": {}},
    # Several tokens at once, as on a GPU, over a batch of rows that end at different times.
    "burst": {"family": "qwen3", "layout": {}, "stops": True, "trains": True, "burst": 5},
    "llama": {"family": "llama3", "layout": {}, "batch": None},
    "head": {"family": "qwen3_head", "layout": {}},
    "dora": {"family": "qwen3_dora", "layout": {}, "peft": {"type": "dora"}, "trains": True},
}
TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
TWO = {
    "tp": {"family": "qwen3", "layout": TP, "stops": True},
    "sp": {"family": "qwen3", "layout": TP | {"sequence_parallel": True}, "trains": True},
    "sp_a2a": {
        "family": "qwen3",
        "layout": TP | {"sequence_parallel": True},
        "peft": {"a2a_experimental": True},
    },
    "sp_gemma": {"family": "gemma3", "layout": TP | {"sequence_parallel": True, "activation_checkpointing": True}},
    "sp_dora": {
        "family": "qwen3_dora",
        "layout": TP | {"sequence_parallel": True},
        "peft": {"type": "dora"},
        "trains": True,
    },
    "sp_head": {"family": "qwen3_head", "layout": TP | {"sequence_parallel": True}},
    "pp": {"family": "qwen3", "layout": PP, "stops": True, "trains": True},
    "pp_tied": {"family": "qwen2", "layout": PP},
    "pp_batch1": {"family": "llama3", "layout": PP, "batch": 1},
    "vpp": {"family": "qwen3", "layout": PP | {"virtual_pipeline_model_parallel_size": 2}},
    "dp": {"family": "qwen3", "layout": {}, "stops": True},
    "cp": {"family": "qwen3", "layout": {"context_parallel_size": 2}},
}
FOUR = {"tp_pp": {"family": "qwen3", "layout": TP | PP | {"sequence_parallel": True}}}
CASES = {name: (size, case) for size, cases in ((1, ONE), (2, TWO), (4, FOUR)) for name, case in cases.items()}
# Four ranks take a minute and a half of two cores.
NAMES = [pytest.param(name, marks=[pytest.mark.long] if size > 2 else []) for name, (size, _) in CASES.items()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """family -> (base, adapter); `qwen3_head` has an adapter on its head too."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for family in FAMILIES:
        base = save_model(folder / family, family)
        made[family] = (base, save_adapter(base, folder / f"{family}_adapter"))
    base = made["qwen3"][0]
    made["qwen3_dora"] = (base, save_adapter(base, folder / "dora_adapter", use_dora=True))
    made["qwen3_head"] = (base, save_adapter(base, folder / "head_adapter", targets=[*TARGETS, "lm_head"]))
    return made


class Results:
    """What each rank of a case saved; a world size runs its chosen cases in one start, when first asked for one."""

    def __init__(self, models: dict[str, tuple[Path, Path]], folder: Path, chosen: set[str]):
        self.models, self.folder = models, folder
        self.chosen = chosen | {"one"}  # the others are compared with it

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        size, _ = CASES[name]
        request = self.folder / f"{size}.json"
        if not request.exists():
            cases = {name: CASES[name][1] for name in sorted(self.chosen) if CASES[name][0] == size}
            request.write_text(json.dumps({name: self._filled(case) for name, case in cases.items()}))
            run_ranks("tests.distributed.native_worker", size, request, self.folder)
        return [torch.load(self.folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(size)]

    def _filled(self, case: dict[str, Any]) -> dict[str, Any]:
        base, adapter = self.models[case["family"]]
        return case | {"model": str(base), "adapter": str(adapter)}


@pytest.fixture(scope="module")
def results(
    models: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Results:
    return Results(models, tmp_path_factory.mktemp("results"), chosen(request, CASES))


@pytest.fixture(scope="module")
def reference(models: dict[str, tuple[Path, Path]]) -> dict[str, list[list[int]]]:
    """family -> greedy answers of transformers + peft, prompt by prompt."""
    answers = {}
    for family, (base, adapter) in models.items():
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        answers[family] = _greedy(PeftModel.from_pretrained(model, adapter))
    answers["base"] = _greedy(AutoModelForCausalLM.from_pretrained(models["qwen3"][0], attn_implementation="eager"))
    return answers


def _greedy(model: Any) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    made = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


def _completions(values: list[dict[str, Any]]) -> list[list[int]]:
    return [value["completion_ids"] for value in values]


def _largest_error(trainer: list[torch.Tensor], samples: list[Sample]) -> float:
    pairs = zip(trainer, samples, strict=True)
    return max(float((logps[-len(s.completion_ids) :] - s.logprobs).abs().max()) for logps, s in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name: str, results: Results, reference: dict) -> None:
    for result in results[name]:
        assert _completions(result["greedy"]) == reference[CASES[name][1]["family"]]
        assert {value["finish_reason"] for value in result["greedy"]} == {"length"}
        assert {value["adapter_version"] for value in result["greedy"]} == {3}


@pytest.mark.parametrize("name", NAMES)
def test_sampled_logprobs_equal_the_trainers(name: str, results: Results) -> None:
    for result in results[name]:
        samples = generator_samples(result["sampled"])
        assert [sample.prompt_index for sample in samples] == [index for index in range(5) for _ in range(3)]
        assert _largest_error(result["trainer"], samples) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_with_top_k_and_top_p_the_trainers_logprobs_are_those_of_the_cut_distribution(
    name: str, results: Results
) -> None:
    for result in results[name]:
        samples = generator_samples(result["cut"])
        assert _largest_error(result["cut_trainer"], samples) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_every_sample_and_the_model_is_as_before(name: str, results: Results) -> None:
    first = results[name][0]
    for result in results[name]:
        assert _completions(result["sampled"]) == _completions(first["sampled"])
        assert result["state_kept"]
        assert result["fingerprints"][0] == result["fingerprints"][1] == first["fingerprints"][0]
    assert first["replicas"] == (2 if name in ("dp", "cp") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_the_layout_and_differ_from_each_other(name: str, results: Results) -> None:
    found = _completions(results[name][0]["sampled"])
    assert len({tuple(ids) for ids in found}) == len(found)
    if CASES[name][1]["family"] == "qwen3":
        assert found == _completions(results["one"][0]["sampled"])


@pytest.mark.parametrize("name", ["one", "llama", "tp", "sp"])
def test_a_prompt_is_read_once_for_all_its_answers(name: str, results: Results) -> None:
    for result in results[name]:
        assert result["prompt_tokens"] == sum(len(prompt) for prompt in prompts())


@pytest.mark.parametrize("name", NAMES)
def test_caches_take_the_memory_that_is_reckoned_with(name: str, results: Results) -> None:
    for result in results[name]:
        held, reckoned = result["cache_bytes"]
        assert held == reckoned > 0


@pytest.mark.parametrize("name", [name for name, (_, case) in CASES.items() if case.get("stops")])
def test_stop_strings_and_stop_tokens(name: str, results: Results) -> None:
    greedy = generator_samples(results[name][0]["greedy"])
    options = stop_options(greedy)
    ended = 0
    for result in results[name]:
        for whole, stopped in zip(greedy, generator_samples(result["stopped"]), strict=True):
            wanted = _cut(whole.completion_ids, options.stop_strings[0], options.stop_token_ids[0])
            assert stopped.completion_ids == wanted
            assert stopped.finish_reason == ("stop" if len(wanted) < 12 or _stops(wanted, options) else "length")
            assert stopped.text == "".join(f"<{token}>" for token in wanted)
            ended += len(wanted) < 12
    assert ended >= 2 * len(results[name])


def _stops(ids: list[int], options: Any) -> bool:
    text = tokenizer().decode(ids)
    return options.stop_strings[0] in text or ids[-1] in options.stop_token_ids


def _cut(ids: list[int], string: str, token: int) -> list[int]:
    for size in range(1, len(ids) + 1):
        if string in "".join(f"<{i}>" for i in ids[:size]) or ids[size - 1] == token:
            return ids[:size]
    return ids


@pytest.mark.parametrize("name", [name for name, (_, case) in CASES.items() if case.get("stops")])
def test_with_adapters_disabled_the_base_answers(name: str, results: Results, reference: dict) -> None:
    for result in results[name]:
        assert _completions(result["base"]) == reference["base"]
        assert reference["base"] != reference["qwen3"]


@pytest.mark.parametrize("name", [name for name, (_, case) in CASES.items() if case.get("stops")])
def test_merged_weights_are_those_held_and_nothing_is_copied(name: str, results: Results) -> None:
    for result in results[name]:
        num_bytes, given, held, version = result["merged"]
        assert (num_bytes, version) == (0, 4)
        assert given == held and given.startswith("merge:")


@pytest.mark.parametrize("name", [name for name, (_, case) in CASES.items() if case.get("trains")])
def test_after_a_step_the_new_adapter_answers_and_a_stale_one_is_noticed(name: str, results: Results) -> None:
    for result in results[name]:
        stale, held = result["stale"]
        assert stale == result["fingerprints"][0] and held != stale
        assert _largest_error(result["trained_trainer"], generator_samples(result["trained"])) < 1e-5
        # No rank draws from a model that has diverged, and none waits for another.
        assert "are not numbers" in result["diverged"] and "learning rate" in result["diverged"]


def test_refusals_name_the_key_and_the_fix(results: Results) -> None:
    refused = results["one"][0]["refused"]
    assert refused["empty"].startswith("prompt 1 has 0 tokens; wanted 1 to 63")
    assert refused["long"].startswith("prompt 0 has 64 tokens") and "max_total_sequence_length" in refused["long"]
    assert "give the generator a tokenizer" in refused["tokenizer"]
    assert "policy.megatron_cfg.enabled=true" in refused["backend"]
    assert "expert_model_parallel_size=2" in refused["experts"]
    assert refused["fits"] == "1"
    assert refused["none"] == "[]"
