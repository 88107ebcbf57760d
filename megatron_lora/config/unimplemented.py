"""NeMo RL's keys that have no effect here.

Two kinds. *At its default only*: the key asks for something that this project does not do, so another value is
refused by name. *Any value*: the key cannot change what a run computes here (the table says why), so any value is
accepted. Either way the loader returns one notice that lists those that a recipe has
(`without_effect.py` applies the table).

Not tables of defaults of our own: the values are facts about NeMo RL's base recipes (several where those differ).
"""

from megatron_lora.config import unimplemented_policy, unimplemented_rollouts, unimplemented_run
from megatron_lora.config.unimplemented_kinds import ANY, Group, SameAs

__all__ = ["ANY", "KNOWN_PATHS", "TABLE", "Group", "SameAs"]

TABLE = unimplemented_run.TABLE + unimplemented_policy.TABLE + unimplemented_rollouts.TABLE

KNOWN_PATHS: tuple[str, ...] = tuple(
    (f"{group.section}.{name}" if group.section else name).removesuffix(".*") for group in TABLE for name in group.keys
)
"""Every path of the table, for suggestions."""
