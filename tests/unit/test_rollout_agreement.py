"""What counts as rounding between a trainer and its rollout engine: simulated engines, no model."""

import pytest
import torch
from torch import Tensor

from megatron_lora.rollout.agreement import BOUNDS, REMEMBERED, Agreement, logit_distance

BF16 = torch.bfloat16


def drawn(tokens: int, *, sharpness: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """(engine's, trainer's) log-probabilities of tokens that the engine drew, logits apart by the noise."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 50, generator=draw) * sharpness
    engine = (logits + noise * torch.randn(logits.shape, generator=draw)).log_softmax(-1)
    trainer = (logits + noise * torch.randn(logits.shape, generator=draw)).log_softmax(-1)
    ids = torch.multinomial(engine.exp(), 1, generator=draw)
    return engine.gather(1, ids).squeeze(1), trainer.gather(1, ids).squeeze(1)


def test_the_distance_is_a_sum_over_what_is_uncertain() -> None:
    engine, trainer = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5, 0.75]).log()
    # |log 3| over (1 - 0.5) + (1 - 0.5) + the prior of 4 tokens.
    assert logit_distance(engine, trainer) == pytest.approx(1.0986123 / 5)
    assert logit_distance(engine, engine) == 0.0
    assert torch.isnan(torch.tensor(logit_distance(torch.tensor([float("nan")]), engine[:1])))


def test_the_distance_hardly_depends_on_how_sure_the_text_is() -> None:
    """A mean over tokens falls by more than half."""
    pairs = [drawn(4000, sharpness=sharpness, noise=0.05, seed=1) for sharpness in (1.0, 4.0, 8.0)]
    distances = [logit_distance(*pair) for pair in pairs]
    means = [float((engine - trainer).abs().mean()) for engine, trainer in pairs]
    assert min(means) < 0.5 * max(means)
    assert min(distances) > 0.7 * max(distances)


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_no_false_alarm_in_400_steps_and_another_model_is_told(sharpness: float) -> None:
    """The text grows surer while the run learns."""
    agreement = Agreement(BF16)
    for step in range(400):
        pair = drawn(256, sharpness=sharpness * (1 + step / 400), noise=0.05, seed=step)
        assert agreement.accepts(logit_distance(*pair)), (step, agreement.describe())
    # A fault moves logits by 5 times what rounding does.
    assert not agreement.accepts(logit_distance(*drawn(256, sharpness=sharpness, noise=0.25, seed=7)))


def test_the_tolerance_follows_what_the_run_measured() -> None:
    agreement = Agreement(BF16)
    assert agreement.tolerance == BOUNDS[BF16].never and agreement.noise is None
    assert agreement.accepts(0.06)
    assert agreement.tolerance == pytest.approx(0.15)
    assert not agreement.accepts(0.2)
    assert agreement.noise == 0.06  # what is refused is not learned from
    for _ in range(REMEMBERED):
        assert agreement.accepts(0.001)
    assert agreement.tolerance == BOUNDS[BF16].always
    assert "tolerance 5.0e-02 (rounding in this run: 1.0e-03)" in agreement.describe()


def test_whatever_a_run_measures_there_is_an_end() -> None:
    agreement = Agreement(BF16)
    distance = 0.06
    while agreement.accepts(distance):
        distance *= 1.5
        assert distance < 1
    assert not Agreement(BF16).accepts(float("nan"))
    assert not Agreement(torch.float32).accepts(2e-3)
