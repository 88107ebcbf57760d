"""Sampling: processed distributions against hand-derived numbers and transformers' warpers, draws, stop rules."""

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper

from megatron_lora.rollout.generator import SamplingOptions
from megatron_lora.rollout.sampling import StopRule, draw, processed_logprobs, random_stream

PROBABILITIES = [0.4, 0.3, 0.2, 0.1]


def options(**changes: object) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=4, **changes)  # type: ignore[arg-type]


def test_hand_derived_top_p_and_top_k() -> None:
    logits = torch.tensor([PROBABILITIES]).log()
    # 0.4 + 0.3 reaches 0.6, so two are kept: 0.4 / 0.7 and 0.3 / 0.7.
    kept = processed_logprobs(logits, options(top_p=0.6)).exp()
    torch.testing.assert_close(kept, torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))
    # The three most likely: 4/9, 3/9, 2/9.
    kept = processed_logprobs(logits, options(top_k=3)).exp()
    torch.testing.assert_close(kept, torch.tensor([[4 / 9, 3 / 9, 2 / 9, 0.0]]))
    # top_p counts what top_k left: 4/9 is below 0.5, 7/9 is not, so two are kept.
    kept = processed_logprobs(logits, options(top_k=3, top_p=0.5)).exp()
    torch.testing.assert_close(kept, torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))


def test_temperature_comes_before_the_cuts() -> None:
    logits = torch.tensor([PROBABILITIES]).log()
    # At temperature 0.5 probabilities are squared: 16, 9, 4, 1 of 30; 16/30 reaches 0.5 alone.
    kept = processed_logprobs(logits, options(temperature=0.5, top_p=0.5)).exp()
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    squared = processed_logprobs(logits, options(temperature=0.5)).exp()
    torch.testing.assert_close(squared, torch.tensor([[16.0, 9.0, 4.0, 1.0]]) / 30)


def test_greedy_reports_the_models_own_distribution() -> None:
    logits = torch.randn(3, 11)
    torch.testing.assert_close(processed_logprobs(logits, options(temperature=0.0, top_k=2)), logits.log_softmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (-1, 0.7), (20, 0.9), (500, 0.01)])
def test_the_same_tokens_stay_as_in_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(16, 101, generator=torch.Generator().manual_seed(0)) * 3
    wanted = logits / 0.8
    if top_k > 0:
        wanted = TopKLogitsWarper(top_k)(torch.empty(0), wanted)  # type: ignore[arg-type]
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(torch.empty(0), wanted)  # type: ignore[arg-type]
    got = processed_logprobs(logits, options(temperature=0.8, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(got, wanted.log_softmax(-1))


def test_bfloat16_logits_are_normalised_in_fp32() -> None:
    logits = torch.randn(2, 1000).bfloat16()
    got = processed_logprobs(logits, options())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))


def test_draws_follow_the_distribution_and_never_take_what_was_cut() -> None:
    count = 40_000
    logprobs = processed_logprobs(torch.tensor([PROBABILITIES]).log(), options(top_k=3)).expand(count, -1)
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shares = torch.bincount(draw(logprobs, uniforms), minlength=4) / count
    # Five standard errors of a share near 1/3.
    tolerance = 5 * math.sqrt(0.25 / count)
    torch.testing.assert_close(shares, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]), atol=tolerance, rtol=0)
    assert shares[3] == 0


def test_draws_from_a_large_vocabulary_are_those_of_one_running_sum() -> None:
    random = torch.Generator().manual_seed(2)
    logprobs = (3 * torch.randn(500, 1300, generator=random)).log_softmax(-1)
    logprobs[:, 600:900] = float("-inf")
    uniforms = torch.rand(500, dtype=torch.float64, generator=random)
    cumulative = logprobs.double().exp().cumsum(-1)
    wanted = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    assert torch.equal(draw(logprobs, uniforms), wanted)
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    only = torch.full((2, 1300), float("-inf")).index_fill(1, torch.tensor([700]), 0.0)
    assert draw(only, ends).tolist() == [700, 700]


def test_draws_at_the_edges() -> None:
    logprobs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(3, -1)
    uniforms = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logprobs, uniforms).tolist() == [1, 2, 2]


def test_streams_depend_on_seed_prompt_and_sample_only() -> None:
    assert random_stream(1, 2, 3).random() == random_stream(1, 2, 3).random()
    others = {random_stream(*key).random() for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (-1, 2, 3))}
    assert len(others) == 5


def byte_tokenizer() -> Any:
    """Each token is one byte, `<0xE2>`; as SentencePiece models with byte fallback decode."""
    inner = Tokenizer(models.WordLevel({f"<0x{byte:02X}>": byte for byte in range(256)}, unk_token="<0x00>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_stop_string_over_many_tokens_is_found_at_its_last_byte() -> None:
    rule = StopRule(options(stop_strings=("</antwört €>", "never")), byte_tokenizer())
    text = "x" * 50 + "</antwört €>"
    ids = list(text.encode())
    met = [rule.first_end(ids[: size - 1], ids[size - 1 : size]) == 0 for size in range(1, len(ids) + 1)]
    assert met == [False] * (len(ids) - 1) + [True]


def test_stop_tokens_and_missing_tokenizer() -> None:
    rule = StopRule(options(stop_token_ids=(7, 9)), None)
    assert [rule.first_end(ids[:-1], ids[-1:]) for ids in ([1], [7, 1], [1, 9])] == [None, None, 0]
    assert rule.first_end([1], [3, 9, 7]) == 1
    with pytest.raises(ValueError, match="tokenizer"):
        StopRule(options(stop_strings=("x",)), None)
