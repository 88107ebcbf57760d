"""The steps of `make quickstart`: base, LoRA run at TP=2, both exports, their check with transformers and peft."""

from pathlib import Path

import pytest

from megatron_lora.reporting.console import build_console
from tests.support.trainer import read_metrics
from tools.quickstart import JOBS, LOGIT_TOLERANCE, build_summary, check, export, next_run_dir, train
from tools.tiny_model import build_base


def test_steps_of_the_quickstart_on_a_base_of_few_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    base_dir = build_base(tmp_path / "base", steps=20)
    run_dir = next_run_dir(tmp_path, "run")
    step_dir = train(JOBS["sft"].recipe, base_dir, run_dir)
    adapter_dir, merged_dir = export(step_dir, base_dir, run_dir / "export")
    checks = check(base_dir, adapter_dir, merged_dir)
    build_console().print(build_summary(checks, {"adapter": adapter_dir}, seconds=1.0))
    shown = capfd.readouterr().out

    losses = [record["loss"] for record in read_metrics(run_dir)]
    assert len(losses) == 60 and losses[-1] < 0.95 * losses[0]
    assert checks.adapter_to_merged <= LOGIT_TOLERANCE < checks.base_to_merged
    assert checks.accuracy_adapter == checks.accuracy_merged
    assert (run_dir / "loss.png").is_file()
    assert "$ torchrun --standalone --nproc-per-node 2 -m megatron_lora.train" in shown
    assert "sft 60/60" in shown and "equal: largest logit difference" in shown
    assert next_run_dir(tmp_path, "run") == tmp_path / "run-2"
