"""PPO's critic on this backend: a second set of factors and a value head on the policy's own model, with Megatron's
gradient buffers and an optimizer of their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.model_names import ModelParameter
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.lora.inject import Adapted
from megatron_lora.policy.critic import VALUE_HEAD, VALUE_HEAD_WEIGHT, critic_spec, draw_value_head
from megatron_lora.policy.learning_rate import build_scheduler
from megatron_lora.policy.megatron import optim, schedule
from megatron_lora.policy.megatron.factor_sets import FactorSet
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.policy.megatron.saved_modules import SavedTensor
from megatron_lora.policy.megatron.value_head import ValueHead


def _in_place(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, called while the critic's parameters are in the model."""

    @wraps(method)
    def call(self: "MegatronCritic", *args: Any, **kwargs: Any) -> Any:
        with self._parameters_in_place():
            return method(self, *args, **kwargs)

    return call


class MegatronCritic(MegatronPolicy):
    """What trains and scores values instead of log-probabilities; otherwise the policy that it shares a base with.

    actor: that policy. config: its section with the critic's optimizer. Between calls the model is the actor's.
    """

    scored = "value of a token"
    _is_in_place = False

    def __init__(self, actor: MegatronPolicy, config: PolicyConfig, *, seed: int, num_steps: int):
        self.actor = actor
        super().__init__(config, actor.world, pad_token_id=actor.pad_token_id, seed=seed, num_steps=num_steps)

    def _build(self, seed: int, num_steps: int) -> WeightSource:
        actor, policy = self.actor, self.config
        assert actor.spec is not None
        self.base, self.tp, self.shapes = actor.base, actor.tp, actor.shapes
        self.unshared_reason = actor.unshared_reason
        self.spec = critic_spec(actor.spec)
        self.adapted: list[Adapted] = [linear for linear in actor.adapted if linear.layout.kind != "output_layer"]
        self._unused = [held.parameter for linear in actor.adapted for held in linear.held_factors]
        self._factors = FactorSet(self.base.chunks, self.adapted)
        self._head: ValueHead | None = None
        self.saved = []
        if self.base.has_last_stage:
            # Of the factors' dtype: Megatron's distributed optimizer loses count where a group has masters of some.
            dtype = getattr(torch, policy.megatron_cfg.peft.lora_dtype or policy.precision)
            weight = draw_value_head(self.shapes.hidden_size, seed)
            self._head = ValueHead(weight.to(self.world.device, dtype))
            entry = ModelParameter(VALUE_HEAD_WEIGHT, (VALUE_HEAD_WEIGHT,), tuple(weight.shape))
            self.saved.append(SavedTensor(VALUE_HEAD_WEIGHT, entry, self._head.weight, self.shapes))
        with self._parameters_in_place():
            self.chunks = optim.wrap_for_data_parallel(self.base.chunks, policy, self.base.config)
            self.optimizer = optim.build_optimizer(self.chunks, policy)
        self.scheduler = build_scheduler(self.optimizer, policy, num_steps)
        self.engine = schedule.Engine(
            chunks=self.chunks,
            config=self.base.config,
            world=self.world,
            tp=self.tp,
            head=actor.engine.head,
            rotary=actor.engine.rotary,
            names_padding=actor.engine.names_padding,
            value_head=self._head,
        )
        # The routers' loss is part of whatever trains through them.
        self.balancing = actor.balancing
        return self.base.weights

    def _remember_start(self, keeps_start: bool) -> None:
        """A critic has no reference."""
        self._gradients_checked = False
        self._start = self._bare = None

    @contextmanager
    def _parameters_in_place(self) -> Iterator[None]:
        """The model with the critic's factors and head; the actor's are no parameters of it, those on the output layer
        frozen."""
        if self._is_in_place:
            yield
            return
        last: Any = self.base.chunks[-1]
        trains = [(parameter, parameter.requires_grad) for parameter in self._unused]
        try:
            self._is_in_place = True
            for parameter in self._unused:
                parameter.requires_grad_(False)
            if self._head is not None:
                last.add_module(VALUE_HEAD, self._head)
            with self._factors.in_place():
                yield
        finally:
            if self._head is not None:
                delattr(last, VALUE_HEAD)
            for parameter, value in trains:
                parameter.requires_grad_(value)
            self._is_in_place = False

    forward_backward = _in_place(MegatronPolicy.forward_backward)
    optim_step = _in_place(MegatronPolicy.optim_step)
    evaluate = _in_place(MegatronPolicy.evaluate)
    _forward = _in_place(MegatronPolicy._forward)
    save = _in_place(MegatronPolicy.save)
    load = _in_place(MegatronPolicy.load)
    _trained = _in_place(MegatronPolicy._trained)

    def trainable_parameters(self) -> tuple[int, int]:
        assert self.spec is not None
        factors, whole = self.actor.trainable_parameters()
        return self.spec.num_trainable, whole - factors + self.spec.num_trainable
