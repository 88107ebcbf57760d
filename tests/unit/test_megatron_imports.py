"""What is left out when Megatron-Core is imported, and what compiles when it is called."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_lora.runtime import activity
from megatron_lora.runtime.megatron_core import UNUSED, compiling_when_called

LEFT_OUT = [*UNUSED] if torch.cuda.is_available() else [*UNUSED, "torch._dynamo"]


@pytest.mark.slow
def test_megatron_core_comes_without_trackers_and_compiler() -> None:
    code = (
        "import sys; from megatron_lora.runtime.megatron_core import import_megatron_core; import torch; "
        "compiles = torch.compile; import_megatron_core(); import megatron.core; assert torch.compile is compiles; "
        f"print([name for name in {LEFT_OUT} if name in sys.modules]); import wandb"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0 and answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_functions_compile_when_they_are_called_also_within_each_other() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with compiling_when_called():

        @torch.compile(backend=backend, fullgraph=True)
        def half(x: torch.Tensor) -> torch.Tensor:
            return x / 2

        @torch.compile(backend=backend, fullgraph=True)
        def both(x: torch.Tensor) -> torch.Tensor:
            return half(x) + 1

    assert graphs == [] and both.__name__ == "both"
    assert both(torch.tensor([4.0])).item() == 3.0 and both(torch.tensor([6.0])).item() == 4.0
    (graph,) = graphs  # fullgraph: what is called within is a part of the one
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == 2
    assert half(torch.tensor([4.0])).item() == 2.0 and len(graphs) == 2


def test_a_start_is_told_by_its_parts(monkeypatch: Any) -> None:
    monkeypatch.setattr(activity, "_began", [])
    activity.begin("reading data")
    activity.begin("training step 1")
    monkeypatch.setattr(activity.time, "monotonic", lambda: activity._began[-1][1] + 2.5)
    text = activity.describe_start()
    assert text.startswith("the first step was done ") and text.endswith(", training step 1 2.5"), text
    assert "reading data" not in text and ": importing " in text
