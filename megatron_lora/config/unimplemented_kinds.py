"""What the tables of NeMo RL's keys without effect are made of."""

from dataclasses import dataclass
from typing import Any


class Anything:
    """Marks a key whose value has no meaning here."""


ANY = Anything()


@dataclass(frozen=True)
class SameAs:
    """Marks a key that may only repeat another key's value."""

    path: str


@dataclass(frozen=True)
class Group:
    """Keys of one section that have no effect for one reason.

    keys: name below `section` -> accepted values, `ANY`, or (`SameAs`,). A name that ends in `.*` is a whole subtree.
    """

    section: str
    reason: str
    keys: dict[str, Any]


def any_value(*names: str) -> dict[str, Any]:
    """Keys that any value may have."""
    return dict.fromkeys(names, ANY)
