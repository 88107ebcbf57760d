"""What the rest of the recipe must know of a rollout engine. Its checks and how it is built: `rollout/engines.py`,
under the same name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFacts:
    """name: of `rollout/engines.py`. wants_memory: it takes the trainer's GPU while it answers. own_length: it has a
    longest sequence of its own, `vllm_cfg.max_model_len`. outside: it answers beside training, on devices of its own.
    no_experts: why it does not report the experts that it sends tokens to; empty: it does.
    """

    name: str
    wants_memory: bool = False
    own_length: bool = False
    outside: bool = False
    no_experts: str = ""


# `policy.generation.backend` -> who answers (in the trainer's processes, on machines of its own; None: it cannot).
BACKENDS: dict[str, tuple[EngineFacts, EngineFacts | None]] = {
    "vllm": (
        EngineFacts("vllm", wants_memory=True, own_length=True),
        EngineFacts("servers", own_length=True, outside=True),
    ),
    "megatron": (
        EngineFacts("megatron", no_experts="the training model itself answers: its experts are the trainer's already"),
        None,
    ),
}
