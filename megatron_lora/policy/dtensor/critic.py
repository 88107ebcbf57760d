"""PPO's critic on this backend: the second set of factors and the value head of the policy's own model, with an
optimizer of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.policy.critic import critic_spec
from megatron_lora.policy.dtensor.factor_sets import using_critic
from megatron_lora.policy.dtensor.policy import DTensorPolicy


def _in_use(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, called while the model is the critic."""

    @wraps(method)
    def call(self: "DTensorCritic", *args: Any, **kwargs: Any) -> Any:
        with using_critic(self.actor.base.hf):
            return method(self, *args, **kwargs)

    return call


class DTensorCritic(DTensorPolicy):
    """What trains and scores values instead of log-probabilities; otherwise the policy that it shares a base with.

    actor: that policy, whose model was built with a critic. config: its section with the critic's optimizer. Between
    calls the model is the actor's.
    """

    scored = "value of a token"

    def __init__(self, actor: DTensorPolicy, config: PolicyConfig, *, seed: int, num_steps: int):
        self.actor = actor
        super().__init__(config, actor.world, pad_token_id=actor.pad_token_id, seed=seed, num_steps=num_steps)

    def _build(self, seed: int, num_steps: int) -> WeightSource:
        actor = self.actor
        assert actor.spec is not None
        self.base, self.root, self.mesh = actor.base, actor.root, actor.mesh
        self.unshared_reason = actor.unshared_reason
        self.spec = critic_spec(actor.spec)
        with using_critic(self.base.hf):
            self._build_optimizer(num_steps)
        return self.base.weights

    def _remember_start(self, keeps_start: bool) -> None:
        """A critic has no reference."""
        self._gradients_checked = False
        self._start = self._bare = None

    forward_backward = _in_use(DTensorPolicy.forward_backward)
    optim_step = _in_use(DTensorPolicy.optim_step)
    evaluate = _in_use(DTensorPolicy.evaluate)
    _forward = _in_use(DTensorPolicy._forward)
    save = _in_use(DTensorPolicy.save)
    load = _in_use(DTensorPolicy.load)
