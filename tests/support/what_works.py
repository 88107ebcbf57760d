"""What works with what: kinds of adapters by what a run does with them, and the test that shows each.

    python -m tests.support.what_works      prints the table of docs/adapters.md

A cell is there only with its test: `tests/unit/test_what_works.py` looks each of them up, and compares the page.
"""

from dataclasses import dataclass
from typing import Literal

Mark = Literal["yes", "merged", "converted"]
COLUMNS = (
    "training",
    "SFT, whole run",
    "DPO",
    "GRPO, native rollouts",
    "GRPO, vLLM",
    "exact resume",
    "other layout",
    "export",
    "import",
    "DTensor",
)
PARITY, KINDS = "tests/distributed/test_megatron_parity.py", "tests/distributed/test_megatron_kinds.py"
CHECKPOINT, DTENSOR = "tests/distributed/test_megatron_checkpoint.py", "tests/distributed/test_dtensor.py"
PEFT = "tests/unit/test_layout_peft_format.py"
EXPORT, SAVED = "tests/end_to_end/test_adapter_export.py", "tests/unit/test_saved_modules.py"
PRINCIPAL = "tests/unit/test_lora_principal.py"
GRPO = "tests/end_to_end/test_grpo.py"
KIND_RUNS, DPO = "tests/end_to_end/test_kinds.py", "tests/end_to_end/test_dpo.py"
VLLM_RUNS = "tests/end_to_end/test_kinds_vllm.py"


@dataclass(frozen=True)
class Shown:
    """file, test: which test shows it. row: the case, as it stands in that file or in `row_file`."""

    mark: Mark
    file: str
    test: str
    row: str = ""
    row_file: str = ""


def _trained(row: str, test: str = "test_ten_steps_equal_transformers_and_peft") -> Shown:
    return Shown("yes", PARITY, test, row)


def _resumed(row: str) -> dict[str, Shown]:
    return {
        "exact resume": Shown("yes", CHECKPOINT, "test_the_same_layout_goes_on_bit_for_bit", row),
        "other layout": Shown("yes", CHECKPOINT, "test_other_layouts_go_on_alike", row),
    }


def _in_and_out(row: str) -> dict[str, Shown]:
    shown = Shown("yes", PEFT, "test_any_peft_adapter_comes_back_and_loads", row)
    return {"export": shown, "import": shown}


def _dtensor(row: str, test: str = "test_training_equals_transformers_and_peft") -> Shown:
    return Shown("yes", DTENSOR, test, row)


def _whole_run(kind: str) -> Shown:
    """From the command line, with a resume and a stock peft's load of what it exports."""
    return Shown("yes", KIND_RUNS, "test_a_resumed_run_is_the_same_run_and_its_adapter_is_pefts", f'"{kind}": {{')


def _whole_runs(kind: str, *further: str) -> dict[str, Shown]:
    """further: other columns that these runs fill."""
    columns = ("SFT, whole run", "DPO", "GRPO, native rollouts", *further)
    return {column: _whole_run(kind) for column in columns}


def _vllm(row: str, mark: Mark = "yes") -> dict[str, Shown]:
    """From the command line, trainer and engine compared at every step."""
    return {"GRPO, vLLM": Shown(mark, VLLM_RUNS, "test_vllm_computes_with_what_trains", f'"{row}": Given(')}


def _imported(row: str) -> dict[str, Shown]:
    """From the command line: in through `init_adapter`, and out again."""
    return {"import": Shown("yes", VLLM_RUNS, "test_a_folder_goes_in_and_comes_out_bit_for_bit", row)}


BY_LINEAR = Shown("yes", DPO, "test_ten_steps_of_dora_with_ranks_by_linear_equal_trl")
TABLE: dict[str, dict[str, Shown]] = {
    "`lora`": {
        "training": _trained('case("sp", 2, SP)'),
        "SFT, whole run": Shown(
            "yes", "tests/end_to_end/test_sft_resume.py", "test_killed_run_ends_where_the_whole_run_ends"
        ),
        "DPO": Shown("yes", DPO, "test_ten_steps_of_a_new_adapter_equal_trl"),
        "GRPO, native rollouts": Shown("yes", GRPO, "test_answers_by_the_training_model"),
        "GRPO, vLLM": Shown("yes", GRPO, "test_vllm_carries_the_adapter_at_every_step"),
        **_resumed('case("tp", 2, TP, {"dp"'),
        "export": Shown("yes", EXPORT, "test_both_modes_give_one_model"),
        "import": Shown("yes", EXPORT, "test_any_hf_adapter_goes_in_and_comes_out_bit_for_bit"),
        "DTensor": _dtensor('case("tp", 2, TP2)'),
    },
    "`canonical_lora`": {
        "training": _trained('case("own_a", 1, adapter="own")'),
        **_whole_runs("canonical_saved"),
        **_vllm("canonical_by_linear"),
        **_resumed('case("own_a", 2'),
        **_in_and_out('"some_linears"'),
        "DTensor": _dtensor('residual("pissa_tp", 2', "test_an_adapter_of_the_residual_is_pefts_own"),
    },
    "`use_rslora`": {
        "training": _trained('case("pp_unlike", 2'),
        **_whole_runs("dora_by_linear"),
        "DPO": BY_LINEAR,
        **_vllm("canonical_by_linear"),
        **_resumed('case("unlike", 2'),
        **_in_and_out('"all_linear_rslora"'),
        "DTensor": _dtensor('case("scores_unlike_tp", 2', "test_scores"),
    },
    "`lora_plus_ratio`": {
        "training": _trained('case("lora_plus_sp", 2, SP | LORA_PLUS)', "test_lora_plus_gives_b_a_rate_of_its_own"),
        **_whole_runs("qlora", "export"),
        **_vllm("canonical_by_linear"),
        **_resumed('case("dora_lora_plus", 2'),
        **_imported('"lora_plus_ratio": 2.0}'),
        "DTensor": Shown(
            "yes",
            "tests/distributed/test_backends.py",
            "test_twenty_steps_are_the_same_on_both_backends",
            '"lora_plus_ratio": 2.0',
            "tests/distributed/backends_checks.py",
        ),
    },
    "`rank_pattern`, `alpha_pattern`": {
        "training": _trained('case("pp_unlike", 2'),
        **_whole_runs("dora_by_linear"),
        "DPO": BY_LINEAR,
        **_vllm("canonical_by_linear"),
        **_resumed('case("unlike", 2'),
        **_in_and_out('"patterns"'),
        "DTensor": _dtensor('case("scores_unlike_tp", 2', "test_scores"),
    },
    "`dora`": {
        "training": _trained('dora_case("tp", 2, TP)'),
        **_whole_runs("dora_by_linear"),
        "DPO": BY_LINEAR,
        "GRPO, native rollouts": Shown(
            "yes",
            "tests/distributed/test_rollout_native.py",
            "test_after_a_step_the_new_adapter_answers_and_a_stale_one_is_noticed",
            'case("dora", 1, DORA',
        ),
        **_vllm("dora_by_linear", "merged"),
        **_resumed('case("dora_lora_plus", 2'),
        **_in_and_out('"dora"'),
        "DTensor": _dtensor('case("tp_dora", 2'),
    },
    "`pissa`": {
        "training": Shown("yes", KINDS, "test_ten_steps_equal_pefts_own", 'layouts("pissa", PISSA)'),
        **_whole_runs("pissa"),
        **_vllm("pissa"),
        **_resumed('case("pissa", 2'),
        "export": Shown("converted", KINDS, "test_a_stock_peft_loads_what_is_exported", 'layouts("pissa", PISSA)'),
        "import": Shown(
            "converted", "tests/unit/test_lora_principal.py", "test_what_is_trained_is_an_adapter_of_the_base"
        ),
        "DTensor": _dtensor('residual("pissa_tp", 2', "test_an_adapter_of_the_residual_is_pefts_own"),
    },
    "`quantization: nf4`": {
        "training": _trained('nf4_case("tp1", 1, {})'),
        **_whole_runs("qlora", "export"),
        "GRPO, vLLM": Shown(
            "yes",
            "tests/distributed/test_rollout_four_bit.py",
            "test_refits_in_both_modes_answer_with_the_bases_own_values",
        ),
        **_resumed('case("nf4", 2'),
        **_imported('"qlora": KINDS["qlora"],'),
        "DTensor": _dtensor('case("tp_nf4", 2'),
    },
    "`modules_to_save`": {
        "training": Shown("yes", KINDS, "test_whole_modules_train_as_pefts_do", 'layouts("saved", SAVED'),
        **_whole_runs("canonical_saved"),
        **_vllm("canonical_saved", "merged"),
        **_resumed('case("saved", 2'),
        "export": Shown("yes", KINDS, "test_whole_modules_train_as_pefts_do", 'layouts("saved", SAVED'),
        "import": Shown("yes", SAVED, "test_a_folder_of_peft_goes_in_and_out"),
        "DTensor": _dtensor('case("tp_saved", 2'),
    },
}


def markdown() -> str:
    """The table, one row a kind."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind, cells in TABLE.items():
        marks = [cells[column].mark if column in cells else "-" for column in COLUMNS]
        lines.append(f"| {kind} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
