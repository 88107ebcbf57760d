"""Each family's logits and log-probabilities equal transformers' (fp32); the padded vocabulary is invisible."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.distributed.cases import CP, EP, ETP, PP, SP, TP, VOCAB_SIZE, Case, scored_rows
from tests.support.models import EXPERTS, FAMILIES, RARE, UNUSUAL
from tests.support.reference import cut_logits, of_targets

pytestmark = pytest.mark.timeout(2700)

TOLERANCE = 1e-4
LAYOUTS = {
    "tp1": (1, {}),
    "tp": (2, TP),
    "sp": (2, SP),
    "pp": (2, PP),
    "cp": (2, CP),
    "tp_pp": (4, TP | PP),
    "ep": (2, EP),
    "etp": (2, ETP),
    "sp_ep": (4, SP | EP),
}


def case(layout: str, family: str) -> Case:
    ranks, megatron = LAYOUTS[layout]
    return Case(f"logits_{layout}_{family}", ranks, "logits", family, "drawn", megatron=megatron)


def case_of(parameter: Any) -> Case:
    return parameter if isinstance(parameter, Case) else parameter.values[0]


CASES = [case("tp1", family) for family in FAMILIES]
# Gemma 3's language model alone stands in the layouts below; as a part of the whole it is the same layers.
CASES += [case(layout, family) for layout in ("tp", "pp") for family in ("qwen2", "gemma3_tower")]
CASES += [case(layout, family) for layout in ("sp", "cp") for family in ("qwen2", "gemma3")]
CASES += [case(layout, family) for layout in ("tp1", "tp") for family in UNUSUAL]
CASES += [
    case("sp", "llama_biases"),
    case("sp", "gemma3_softcap"),
    case("cp", "qwen3_yarn"),
    case("pp", "gemma3_softcap"),
]
CASES += [case(layout, "qwen3_moe") for layout in ("tp1", "sp", "pp", "cp", "ep", "etp")]
CASES += [case("tp1", "gemma"), case("pp", "gemma"), case("tp1", "gemma2"), case("sp", "gemma2")]
CASES += [case("sp", "nemotron_h")]
CASES += [case("tp1", family) for family in (*EXPERTS, *RARE)]
LONG = [case(layout, family) for layout in ("tp", "pp") for family in FAMILIES if family != "qwen2"]
LONG += [case("tp_pp", family) for family in ("qwen2", "gemma3")]
LONG += [case(layout, family) for layout in ("sp", "pp", "cp", "ep") for family in EXPERTS]
LONG += [case("sp", "gemma"), case("pp", "gemma2"), case("tp1", "qwen3_5"), case("tp", "qwen3_5")]
LONG += [case("pp", "qwen3_5")]
LONG += [case(layout, family) for layout in ("tp1", "sp", "pp", "ep") for family in ("qwen3_next", "qwen3_5_moe")]
LONG += [case(layout, "nemotron_h") for layout in ("tp1", "tp", "pp", "ep")]
LONG += [case(layout, "nemotron") for layout in ("tp1", "sp", "pp")]
LONG += [case(layout, family) for layout in ("sp", "pp", "cp") for family in RARE]
LONG += [case(layout, family) for layout in ("ep", "etp") for family in RARE if family != "exaone4"]
LONG_TOO = [pytest.param(more, marks=pytest.mark.long) for more in LONG]
WHOLE_ROWS = [more for more in [*CASES, *LONG_TOO] if case_of(more).megatron not in (CP, EP)]


class Logits(dict[str, list[torch.Tensor]]):
    """family -> transformers' logits [S, vocabulary] of each row, computed when first asked for."""

    def __init__(self, room: Any):
        super().__init__()
        self.room = room

    def __missing__(self, family: str) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(self.room.base(family), attn_implementation="eager")
        with torch.no_grad():
            self[family] = [model(row.input_ids[None]).logits[0] for row in scored_rows()]
        return self[family]


@pytest.fixture(scope="module")
def transformers_logits(room: Any) -> Logits:
    return Logits(room)


def token_logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[S], the first token's being 0."""
    logps = F.log_softmax(logits[:-1], -1).gather(1, ids[1:, None]).squeeze(1)
    return torch.cat([torch.zeros(1), logps])


# Context parallelism cuts the sequence, and of ranks that share experts one sees the row; there log-probabilities are
# compared alone.
@pytest.mark.parametrize("case", WHOLE_ROWS, ids=str)
def test_logits(case: Case, ranks_found: list[dict[str, Any]], transformers_logits: dict[str, Any]) -> None:
    seen = [found["logits"] for found in ranks_found if found["logits"]]
    assert len(seen) == case.ranks // case.megatron.get("pipeline_model_parallel_size", 1)
    for logits in seen:
        for row, found, wanted in zip(scored_rows(), logits, transformers_logits[case.family], strict=True):
            # Sequence parallelism pads the row; tensor parallelism pads the vocabulary.
            assert found.shape[0] >= len(row) and found.shape[1] >= VOCAB_SIZE
            assert (found[: len(row), :VOCAB_SIZE] - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", [*CASES, *LONG_TOO], ids=str)
def test_log_probabilities(case: Case, ranks_found: list[dict[str, Any]], transformers_logits: dict[str, Any]) -> None:
    for found in ranks_found:
        for position, (row, logits) in enumerate(zip(scored_rows(), transformers_logits[case.family], strict=True)):
            wanted = token_logps(logits, row.input_ids)
            for path in ("plain", "chunked", "without_adapter"):
                assert (found[path][position] - wanted).abs().max() < TOLERANCE, path
            warm = token_logps(logits / 0.7, row.input_ids)
            assert (found["temperature"][position] - warm).abs().max() < TOLERANCE
            cut = cut_logits(logits[:-1] / 0.7, row.input_ids[1:], 30, 0.6)
            wanted = torch.cat([torch.zeros(1), of_targets(cut, row.input_ids[1:])])
            assert (wanted - warm).max() > 0.1
            for path in ("cut", "cut_plain"):
                assert (found[path][position] - wanted).abs().max() < TOLERANCE, path


@pytest.mark.parametrize("case", [*CASES, *LONG_TOO], ids=str)
def test_parameters_are_counted_once(case: Case, found: dict[str, Any], room: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(room.base(case.family))
    # Of a vision-language model the language model, and the head that is tied to it.
    language = getattr(model.model, "language_model", model)
    base = sum(parameter.numel() for parameter in language.parameters())
    # The bias by which a router chooses experts.
    base += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    trainable, everything = found["trainable"]
    # Without the padding of the vocabulary, which depends on the layout.
    assert everything - trainable == base
