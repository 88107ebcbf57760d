"""Native generation on real ranks against transformers + peft `generate`, and its log-probabilities against the
trainer's, in every layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_lora.rollout.generator import Sample
from tests.distributed.cases import CP, PP, SP, TP, VPP, Case
from tests.distributed.native_checks import generator_samples, prompts, stop_options, tokenizer

# The first test of a world size waits for all of its cases.
pytestmark = pytest.mark.timeout(2700)

DORA: dict[str, Any] = {"peft": {"type": "dora"}}
ALL_TO_ALL = SP | {"peft": {"a2a_experimental": True}}


def case(
    name: str, ranks: int, megatron: dict, *, batch: int | None = 3, needs: Case | None = None, **rest: Any
) -> Case:
    """rest: family, adapter, or what the check is asked for. batch: `policy.generation_batch_size`."""
    fields = {key: rest.pop(key) for key in ("family", "adapter") if key in rest}
    keys = megatron | {"peft": {"dropout": 0.3} | megatron.get("peft", {})}
    policy = {"generation_batch_size": batch}
    return Case(f"native_{name}", ranks, "answers", megatron=keys, policy=policy, options=rest, needs=needs, **fields)


ONE = case("one", 1, {}, stops=True, trains=True, refuses=True)


def like_one(name: str, ranks: int, megatron: dict, **rest: Any) -> Case:
    """The same base and adapter: the same samples."""
    return case(name, ranks, megatron, needs=ONE, **rest)


READ_ONCE = [
    ONE,
    case("llama", 1, {}, family="llama3", batch=None),
    like_one("tp", 2, TP, stops=True),
    like_one("sp", 2, SP, trains=True),
]
CASES = [
    *READ_ONCE,
    case("gemma", 1, {}, family="gemma3_softcap"),
    # Several tokens at once, as on a GPU, over a batch of rows that end at different times.
    like_one("burst", 1, {}, stops=True, trains=True, burst=5),
    # Mixers that carry a state, beside attention: a row's own, whose slot moves as others end.
    case("nemotron_h", 1, {}, family="nemotron_h", adapter="mamba", trains=True, burst=5),
    case("head", 1, {}, adapter="head"),
    case("sp_dora", 2, SP | DORA, adapter="dora", trains=True),
    like_one("pp", 2, PP, stops=True, trains=True),
    case("pp_tied", 2, PP, family="qwen2"),
    case("pp_batch1", 2, PP, family="llama3", batch=1),
    like_one("vpp", 2, VPP),
    like_one("dp", 2, {}, stops=True),
    like_one("cp", 2, CP),
]
LONG = [
    case("dora", 1, DORA, adapter="dora", trains=True),
    case("qwen3_next", 1, {}, family="qwen3_next", adapter="delta_attention", trains=True),
    case("sp_qwen3_5", 2, SP, family="qwen3_5", adapter="delta"),
    case("pp_nemotron_h", 2, PP, family="nemotron_h", adapter="mamba"),
    like_one("sp_a2a", 2, ALL_TO_ALL),
    case("sp_gemma", 2, SP | {"activation_checkpointing": True}, family="gemma3"),
    case("sp_head", 2, SP, adapter="head"),
    # Four ranks take a minute and a half of two cores.
    like_one("tp_pp", 4, SP | PP),
]
# The delta rule rounds otherwise token by token than in chunks: 1.05e-5.
LIMITS = {"qwen3_next": 3e-5, "qwen3_5": 3e-5}
EVERY = pytest.mark.parametrize("case", [*CASES, *(pytest.param(one, marks=pytest.mark.long) for one in LONG)], ids=str)
STOPPED = pytest.mark.parametrize("case", [case for case in CASES if case.options.get("stops")], ids=str)
Found = list[dict[str, Any]]
Greedy = Callable[[Case, bool], list[list[int]]]


@pytest.fixture(scope="session")
def reference(room: Any) -> Greedy:
    """Greedy answers of transformers + peft to a case's base, with its adapter or without, prompt by prompt."""
    known: dict[tuple[str, str], list[list[int]]] = {}

    def answers(case: Case, adapted: bool) -> list[list[int]]:
        key = (case.family, str(case.adapter) if adapted else "")
        if key not in known:
            model: Any = AutoModelForCausalLM.from_pretrained(room.base(case.family), attn_implementation="eager")
            known[key] = _greedy(PeftModel.from_pretrained(model, room.adapter(*key)) if adapted else model)
        return known[key]

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


def limit(case: Case) -> float:
    """Of a log-probability, nats."""
    return LIMITS.get(case.family, 1e-5)


def _largest_error(trainer: list[torch.Tensor], samples: list[Sample]) -> float:
    pairs = zip(trainer, samples, strict=True)
    return max(float((logps[-len(s.completion_ids) :] - s.logprobs).abs().max()) for logps, s in pairs)


@EVERY
def test_greedy_tokens_equal_transformers(case: Case, ranks_found: Found, reference: Greedy) -> None:
    for result in ranks_found:
        assert _completions(result["greedy"]) == reference(case, True)
        assert {value["finish_reason"] for value in result["greedy"]} == {"length"}
        assert {value["adapter_version"] for value in result["greedy"]} == {3}


@EVERY
def test_sampled_logprobs_equal_the_trainers(case: Case, ranks_found: Found) -> None:
    for result in ranks_found:
        samples = generator_samples(result["sampled"])
        assert [sample.prompt_index for sample in samples] == [index for index in range(5) for _ in range(3)]
        assert _largest_error(result["trainer"], samples) < limit(case)


@EVERY
def test_with_top_k_and_top_p_the_trainers_logprobs_are_those_of_the_cut_distribution(
    case: Case, ranks_found: Found
) -> None:
    for result in ranks_found:
        samples = generator_samples(result["cut"])
        assert _largest_error(result["cut_trainer"], samples) < limit(case)


@EVERY
def test_every_rank_has_every_sample_and_the_model_is_as_before(case: Case, ranks_found: Found) -> None:
    first = ranks_found[0]
    for result in ranks_found:
        assert _completions(result["sampled"]) == _completions(first["sampled"])
        assert result["state_kept"]
        assert result["fingerprints"][0] == result["fingerprints"][1] == first["fingerprints"][0]
    assert first["replicas"] == (2 if case.name in ("native_dp", "native_cp") else 1)


@EVERY
def test_samples_do_not_depend_on_the_layout_and_differ_from_each_other(
    case: Case, ranks_found: Found, workers: Any
) -> None:
    found = _completions(ranks_found[0]["sampled"])
    assert len({tuple(ids) for ids in found}) == len(found)
    if case.needs is not None:
        assert found == _completions(workers.found(case.needs)[0]["sampled"])


@pytest.mark.parametrize("case", READ_ONCE, ids=str)
def test_a_prompt_is_read_once_for_all_its_answers(case: Case, ranks_found: Found) -> None:
    for result in ranks_found:
        assert result["prompt_tokens"] == sum(len(prompt) for prompt in prompts())


@EVERY
def test_caches_take_the_memory_that_is_reckoned_with(case: Case, ranks_found: Found) -> None:
    for result in ranks_found:
        held, reckoned = result["cache_bytes"]
        assert held == reckoned > 0


@STOPPED
def test_stop_strings_and_stop_tokens(case: Case, ranks_found: Found) -> None:
    greedy = generator_samples(ranks_found[0]["greedy"])
    options = stop_options(greedy)
    ended = 0
    for result in ranks_found:
        for whole, stopped in zip(greedy, generator_samples(result["stopped"]), strict=True):
            wanted = _cut(whole.completion_ids, options.stop_strings[0], options.stop_token_ids[0])
            assert stopped.completion_ids == wanted
            assert stopped.finish_reason == ("stop" if len(wanted) < 12 or _stops(wanted, options) else "length")
            assert stopped.text == "".join(f"<{token}>" for token in wanted)
            ended += len(wanted) < 12
    assert ended >= 2 * len(ranks_found)


def _stops(ids: list[int], options: Any) -> bool:
    text = tokenizer().decode(ids)
    return options.stop_strings[0] in text or ids[-1] in options.stop_token_ids


def _cut(ids: list[int], string: str, token: int) -> list[int]:
    for size in range(1, len(ids) + 1):
        if string in "".join(f"<{i}>" for i in ids[:size]) or ids[size - 1] == token:
            return ids[:size]
    return ids


@STOPPED
def test_with_adapters_disabled_the_base_answers(case: Case, ranks_found: Found, reference: Greedy) -> None:
    for result in ranks_found:
        assert _completions(result["base"]) == reference(case, False) != reference(case, True)


@STOPPED
def test_merged_weights_are_those_held_and_nothing_is_copied(case: Case, ranks_found: Found) -> None:
    for result in ranks_found:
        num_bytes, given, held, version = result["merged"]
        assert (num_bytes, version) == (0, 4)
        assert given == held and given.startswith("merge:")


@pytest.mark.parametrize("case", [case for case in CASES if case.options.get("trains")], ids=str)
def test_after_a_step_the_new_adapter_answers_and_a_stale_one_is_noticed(case: Case, ranks_found: Found) -> None:
    for result in ranks_found:
        stale, held = result["stale"]
        assert stale == result["fingerprints"][0] and held != stale
        assert _largest_error(result["trained_trainer"], generator_samples(result["trained"])) < limit(case)
        # No rank draws from a model that has diverged, and none waits for another.
        assert "are not numbers" in result["diverged"] and "learning rate" in result["diverged"]


@pytest.mark.parametrize("case", [ONE], ids=str)
def test_refusals_name_the_key_and_the_fix(case: Case, found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert refused["empty"].startswith("prompt 1 has 0 tokens; wanted 1 to 63")
    assert refused["long"].startswith("prompt 0 has 64 tokens") and "max_total_sequence_length" in refused["long"]
    assert "give the generator a tokenizer" in refused["tokenizer"]
    assert "policy.megatron_cfg.enabled=true" in refused["backend"]
    assert "expert_model_parallel_size=2" in refused["experts"]
    assert refused["fits"] == "1"
    assert refused["none"] == "[]"
