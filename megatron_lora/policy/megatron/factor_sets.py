"""A second set of an adapter's factors on the same frozen model, which changes places with the first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.models.gpt import GPTModel
from torch import nn

from megatron_lora.lora.held import marked_alike
from megatron_lora.lora.inject import Adapted


class FactorSet:
    """Parameters of their own in the place of those that `adapted` holds now, with the same values. Whatever is asked
    of the modules within `in_place` (forward and backward passes, gradients, checkpoints) is of this set.

    Parameters change places, not values: each set keeps its memory, its gradient buffers and its optimizer.
    """

    def __init__(self, chunks: Sequence[GPTModel], adapted: Sequence[Adapted]):
        self._adapted = adapted
        held = {held.parameter for linear in adapted for held in linear.held_factors}
        copies = {parameter: marked_alike(parameter) for parameter in held}
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = [
            (module, name, copies[parameter])
            for chunk in chunks
            for module in chunk.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter in copies
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Restored also on an exception."""
        before = [getattr(module, name) for module, name, _ in self._places]
        try:
            for module, name, parameter in self._places:
                setattr(module, name, parameter)
            self._changed()
            yield
        finally:
            for (module, name, _), parameter in zip(self._places, before, strict=True):
                setattr(module, name, parameter)
            self._changed()

    def _changed(self) -> None:
        for linear in self._adapted:
            linear.factors_changed()
