"""Real vLLM engines on two CPU processes beside a Megatron policy: equal to transformers + peft, refits proven."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.rollout_models import CUTS
from tests.support.planted_faults import FAULTS

TOLERANCE = 1e-4


def start(script: str, folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, "-m", f"tests.distributed.{script}", str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    folder = tmp_path_factory.mktemp("rollout")
    result = start("rollout_vllm_checks", folder, 2)
    assert result.returncode == 0, result.stderr[-6000:]
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def found(both: list[dict[str, Any]]) -> dict[str, Any]:
    return both[0]


def test_log_probabilities_equal_pefts(found: dict[str, Any]) -> None:
    assert found["base_error"] < TOLERANCE
    assert found["greedy_error"] < TOLERANCE
    assert found["sampled_error"] < TOLERANCE
    assert found["llama_error"] < TOLERANCE
    assert found["greedy_is_argmax"]


def test_a_real_models_export_answers_alike_everywhere(found: dict[str, Any]) -> None:
    """After a step at PP=2: vLLM's log-probabilities of its answers are those of stock peft and of the trainer."""
    assert found["real_error"] < TOLERANCE
    assert found["real_trainer_error"] < TOLERANCE
    assert found["real_against_start"] > 0.01, "the step must show"
    assert all(text.isascii() and text.strip() for text in found["real_text"])


def test_the_engine_reads_the_base_from_shared_memory(both: list[dict[str, Any]]) -> None:
    """`policy.preload_to_shm`: its log-probabilities are peft's, as asked above, and nothing is left."""
    for found in both:
        assert found["copied"] and found["read"] == found["copy"] and found["copy"].startswith("/dev/shm/")
        assert found["copy_is_gone"]


def test_the_adapter_makes_a_difference(found: dict[str, Any]) -> None:
    assert found["against_base"] > 0.1


def test_trainer_and_rollout_agree(found: dict[str, Any]) -> None:
    assert found["rollout_logprob_error"] < TOLERANCE


def test_samples_are_complete_and_sorted_on_every_rank(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["order"] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert found["prompt_ids_kept"]
        assert found["versions"] == [0]
    assert both[0]["sampled_tokens"] == both[1]["sampled_tokens"]
    assert found["distinct_answers"] > 8


def test_a_seed_repeats_whatever_the_engines_layout(found: dict[str, Any]) -> None:
    assert found["repeatable"]
    assert found["replicas_tokens"] == found["sampled_tokens"]


def test_replicas_share_prompts_out(found: dict[str, Any]) -> None:
    assert found["replicas_agree"]
    assert found["fewer_prompts_than_replicas"] == [1, 0]


def test_log_probabilities_are_of_the_cut_distribution(found: dict[str, Any]) -> None:
    assert found["top_k_error"] < TOLERANCE
    assert found["top_p_error"] < TOLERANCE
    assert all(found[f"trainer_error_{name}"] < TOLERANCE for name in CUTS)


def test_answers_end_where_they_should(found: dict[str, Any]) -> None:
    assert found["stop_token"] == [True, "stop"]
    assert found["stop_string"] == [True, True, "stop"]
    assert found["length"] == [12, "length"]
    assert found["text"]


def test_the_trainers_process_is_left_as_it_was(found: dict[str, Any]) -> None:
    assert found["left_as_it_was"] == [True, True]


def test_a_refit_reports_itself(found: dict[str, Any]) -> None:
    seconds, num_bytes, version, error, mode = found["report"]
    assert 0 < seconds < 60
    # 4 layers of q, k, v, o, gate, up, down, and the head, at rank 4, in fp32.
    linears = [(64, 128), (64, 64), (64, 64), (128, 64), (64, 96), (64, 96), (96, 64)] * 4 + [(64, 101)]
    assert num_bytes == 4 * sum(4 * (inputs + outputs) for inputs, outputs in linears)
    assert (version, mode) == (0, "adapter")
    assert error < TOLERANCE
    assert found["probe_length"] > found["block_size"]


def test_refits_follow_training(found: dict[str, Any]) -> None:
    assert found["after_training"] < TOLERANCE
    assert found["version_after_training"] == 1
    assert found["llama_probe_error"] < TOLERANCE


def numbers_named(text: str) -> tuple[float, float]:
    match = re.search(r"logits are (\S+) nats from the trainer's on answers that it drew, tolerance (\S+) ", text)
    assert match, text
    return float(match[1]), float(match[2])


def test_rounding_is_measured_before_the_first_refit(found: dict[str, Any]) -> None:
    assert 0 < found["measured"] < 1e-5


NOT_THE_SUM = "(merge) what was handed over is not the trainer's base with its present adapter"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_at_once(fault: str, both: list[dict[str, Any]]) -> None:
    """In what is handed over: bit for bit in the adapter's factors, up to one rounding in merged weights."""
    for found in both:
        assert "what was handed over are not the trainer's present factors" in found["planted"]["adapter"][fault]
        assert NOT_THE_SUM in found["planted"]["merge"][fault]


def test_a_skipped_merged_refit_is_caught_however_small_the_update(found: dict[str, Any]) -> None:
    assert f"{NOT_THE_SUM}, in 1 of 28 linears: model.layers." in found["tiny_update_not_merged"]
    assert found["update_merged"] < TOLERANCE


def test_a_skipped_refit_is_caught_however_small_the_update(found: dict[str, Any]) -> None:
    for name in ("skipped_refit", "tiny_update_skipped"):
        assert "what was handed over are not the trainer's present factors" in found[name]
    assert found["tiny_update"] < TOLERANCE
    assert "holds version 0 of the weights, the trainer is at 1" in found["forgotten_version"]


@pytest.mark.parametrize("fault", ["stale_cache", "not_applied", "head_not_applied"])
def test_an_engine_that_does_not_compute_with_what_it_holds_is_caught(fault: str, found: dict[str, Any]) -> None:
    error, tolerance = numbers_named(found[fault])
    assert error > 10 * tolerance
    assert tolerance == TOLERANCE


def test_a_tensor_damaged_on_one_rank_is_caught(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["damaged"].startswith("RolloutError: refit 2 (adapter) did not arrive")


def test_a_replica_that_missed_a_refit_is_caught(found: dict[str, Any]) -> None:
    assert found["replicas_differ"].startswith("RolloutError: vLLM's replicas hold different weights: adapter:")


def test_merged_weights_answer_as_the_adapter_does(found: dict[str, Any]) -> None:
    handed, held = found["merge_fingerprint"]
    assert handed == held and handed.startswith("merge:")
    assert found["merge_equals_adapter"]
    assert found["merge_error"] < TOLERANCE
    assert found["probe_of_merged"] < TOLERANCE
    assert found["merge_bytes"] > 9 * found["report"][1]
    assert found["merge_of_other"].startswith("RolloutError: after refit 4")


def test_every_linear_with_its_own_a_rank_and_scale(found: dict[str, Any]) -> None:
    handed, held = found["uneven_fingerprint"]
    assert handed == held
    assert found["uneven_error"] < TOLERANCE


def test_a_linear_that_vllm_cannot_adapt_is_refused(found: dict[str, Any]) -> None:
    assert "UserError: vLLM cannot put an adapter on model.layers.0.self_attn.w_proj" in found["unknown_linear"]


def test_a_prompt_without_room_for_an_answer_is_refused(found: dict[str, Any]) -> None:
    assert "UserError: prompt 0 has 256 tokens; wanted 1 to 255" in found["long_prompt"]


def test_auto_measures_both_and_says_why(both: list[dict[str, Any]]) -> None:
    for found in both:
        mode, said = found["auto"]
        assert mode == both[0]["auto"][0]
        assert len(said) == 1
        assert said[0].startswith(f"refit by {mode} (the faster step")
        assert "adapter: refit" in said[0] and "merge: refit" in said[0]


def test_merge_by_the_policys_own_weights(found: dict[str, Any]) -> None:
    error, num_bytes = found["llama_merge"]
    assert error < TOLERANCE
    assert num_bytes > 500_000


def test_a_dead_engine_ends_with_its_reason(both: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(both):
        reason = f"vLLM failed to generate on rank {rank}: MemoryError: no memory left for the engine"
        assert reason in found["dead_engine"]
        assert reason in found["dead_engine_again"]
