"""What becomes of passes that cannot be recorded. (Recording itself needs a GPU: tests/gpu.)"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.packing import collate
from megatron_lora.policy.frozen_head import HeadOptions


def no_recording(*_: Any, **__: Any) -> None:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lora.policy.megatron.graphs._Graph", no_recording)
    for name in ("graph_pool_handle", "empty_cache", "memory_reserved", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)


def passes(calls: list[int], *, insists: bool) -> Any:
    # Imports Megatron, which every process that collects these tests would wait for.
    from megatron_lora.policy.megatron import graphs

    def forward(model: Any, batch: MicroBatch) -> torch.Tensor:
        calls.append(batch.tokens.numel())
        return batch.targets.float()

    chunk: Any = torch.nn.Linear(2, 2)
    factors = [SimpleNamespace(parameter=parameter) for parameter in chunk.parameters()]
    linear: Any = SimpleNamespace(held_factors=factors, enabled=True)
    rotary: Any = None
    return graphs.GraphedPasses(chunk, forward, [linear], rotary, 0, insists=insists)


@pytest.mark.usefixtures("cuda")
def test_a_run_goes_on_without_graphs_where_none_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    graphed, head = passes(calls, insists=False), HeadOptions(chunk_size=64, vocab_size=100)
    batch = collate([Row(torch.arange(50), torch.ones(50, dtype=torch.bool))], pad_token_id=0)
    found = [graphed.logps(batch, head) for _ in range(3)]
    assert all(torch.equal(logps, batch.targets.float()) for logps in found)
    assert calls == [64, 64, 50], "stretched, tried to record, then as it is"
    assert "operation not permitted" in caplog.text and "cuda_graph_impl=none" in caplog.text


@pytest.mark.usefixtures("cuda")
def test_who_insists_on_graphs_is_told() -> None:
    graphed, head = passes([], insists=True), HeadOptions(chunk_size=64, vocab_size=100)
    batch = collate([Row(torch.arange(50), torch.ones(50, dtype=torch.bool))], pad_token_id=0)
    graphed.logps(batch, head)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphed.logps(batch, head)
