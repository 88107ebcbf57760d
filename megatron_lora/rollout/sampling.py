"""From logits to tokens: temperature, top-k, top-p, draws that depend on nothing but their seed, and stopping."""

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lora.policy.tail_cut import tail_cut
from megatron_lora.rollout.generator import Decoder, SamplingOptions

# Tokens beyond a stop string's bytes that are decoded with it: some tokens decode to nothing (special tokens).
STOP_SLACK = 8
DRAW_BLOCK = 512


def processed_logprobs(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Log-probabilities [n, vocabulary] (fp32, nats) of the distribution that is sampled from; -inf where cut off.

    logits: [n, vocabulary]. Temperature first, then top-k, then top-p (`policy.tail_cut`), as vLLM's
    `processed_logprobs`. At temperature 0 the model's own distribution.
    """
    logits = logits.float()
    if options.temperature == 0:
        return logits.log_softmax(-1)
    logits = logits / options.temperature
    if options.top_p < 1.0 or 0 < options.top_k < logits.shape[-1]:
        logits = logits.masked_fill(tail_cut(logits, options.top_k, options.top_p), float("-inf"))
    return logits.log_softmax(-1)


def draw_with_logprobs(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """[2, n] fp64: tokens (exact in fp64) and their log-probabilities. logits [n, vocabulary], uniforms [n]."""
    logprobs = processed_logprobs(logits, options)
    tokens = logprobs.argmax(-1) if options.temperature == 0 else draw(logprobs, uniforms.to(logits.device))
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return torch.stack([tokens.double(), chosen.double()])


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [n] from log-probabilities [n, vocabulary] and numbers in [0, 1) [n], by inversion in fp64.

    In two steps, a block of tokens and then the token in it: a running sum over a whole vocabulary is slow on a GPU.
    """
    num_tokens = logprobs.shape[-1]
    size = min(DRAW_BLOCK, num_tokens)
    blocks = F.pad(logprobs.double().exp(), (0, -num_tokens % size)).unflatten(-1, (-1, size))
    block, rest = _invert(blocks.sum(-1), uniforms.double()[:, None])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1)
    token, _ = _invert(inside, rest)
    return (block * size + token).squeeze(1)


def _invert(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Where a share of the row's total weight falls: (index [n, 1], share of that entry's own weight [n, 1]).

    weights [n, k] fp64; shares [n, 1] in [0, 1). Never an entry of weight zero.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(shares * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=weights.shape[-1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, index)
    return index, ((point - before) / weights.gather(1, index)).clamp(0.0, 1.0)


def random_stream(seed: int, prompt_index: int, sample_index: int) -> numpy.random.Generator:
    """One answer's random numbers: the same whatever batch, rank or layout draws it."""
    return numpy.random.default_rng([seed % (1 << 63), prompt_index, sample_index])


class StopRule:
    """What ends an answer besides its length. decoder: needed for stop strings only; raises ValueError without it."""

    def __init__(self, options: SamplingOptions, decoder: Decoder | None):
        if options.stop_strings and decoder is None:
            raise ValueError("stop strings are looked for in decoded text; give the generator a tokenizer")
        self.token_ids = frozenset(options.stop_token_ids)
        self.strings = options.stop_strings
        self.decoder = decoder
        # A token holds at least one byte of the text it stands for, so a string never spans more than these.
        self.window = STOP_SLACK + max((len(string.encode()) for string in self.strings), default=0)

    def first_end(self, completion: Sequence[int], tokens: Sequence[int]) -> int | None:
        """Which of the new tokens behind a completion ends the answer: the first that does, or None."""
        ends = self._ends_with_string if self.strings else None
        for place, token in enumerate(tokens):
            if token in self.token_ids or (ends and ends([*completion[-self.window :], *tokens[: place + 1]])):
                return place
        return None

    def _ends_with_string(self, completion: Sequence[int]) -> bool:
        assert self.decoder is not None
        text = self.decoder.decode(list(completion[-self.window :]), skip_special_tokens=True)
        return any(string in text for string in self.strings)
