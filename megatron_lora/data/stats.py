"""Length statistics of a tokenized data set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from megatron_lora.data.notices import Notices

# Reasons for leaving rows out that are told, the commonest first.
TOLD_REASONS = 5


@dataclass
class LengthStats:
    """What tokenizing a data set did.

    lengths: tokens of every sequence (two for a pair) as tokenized, before truncation. rows: what was read.
    truncated, dropped_long (beyond the limit), dropped_equal (pairs with one answer twice), dropped_bad (hub rows that
    cannot be used): counts of rows. untrained: rows kept that by their own word carry no loss. target_tokens: tokens
    that carry loss in what was kept. unit: what a sequence is; a "prompt" has no target tokens. drops: why a row was
    left out, by its number. notices: what is not honoured.
    """

    max_length: int
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_equal: int = 0
    dropped_bad: int = 0
    untrained: int = 0
    target_tokens: int = 0
    unit: str = "sequence"
    drops: dict[int, str] = field(default_factory=dict, repr=False)
    notices: Notices = field(default_factory=Notices, repr=False)
    lengths: list[int] = field(default_factory=list, repr=False)

    @property
    def dropped(self) -> int:
        return self.dropped_long + self.dropped_equal + self.dropped_bad

    @property
    def min(self) -> int:
        return min(self.lengths, default=0)

    @property
    def mean(self) -> float:
        return float(np.mean(self.lengths)) if self.lengths else 0.0

    @property
    def p95(self) -> float:
        return float(np.percentile(self.lengths, 95)) if self.lengths else 0.0

    @property
    def max(self) -> int:
        return max(self.lengths, default=0)

    def lines(self) -> list[str]:
        """What the log says: counts and lengths, why rows were left out, what is not honoured."""
        lines = [self.describe()]
        reasons = Counter(self.drops.values())
        for reason, count in reasons.most_common(TOLD_REASONS):
            first = next(number for number, why in self.drops.items() if why == reason)
            rows = f"row {first}" if count == 1 else f"{count} rows, first row {first}"
            lines.append(f"dropped ({rows}): {reason}")
        if len(reasons) > TOLD_REASONS:
            lines.append(f"dropped for {len(reasons) - TOLD_REASONS} further reasons")
        if self.untrained:
            lines.append(f"{self.untrained} rows carry no loss, as they say themselves")
        return lines + self.notices.lines()

    def describe(self) -> str:
        """One line: counts and lengths."""
        reasons = [
            f"{count} {reason}"
            for count, reason in (
                (self.dropped_long, f"over {self.max_length} tokens"),
                (self.dropped_equal, "with equal answers"),
                (self.dropped_bad, "unusable"),
            )
            if count
        ]
        dropped = f"{self.dropped} dropped" + (f" ({', '.join(reasons)})" if reasons else "")
        lengths = f"min {self.min}, mean {self.mean:.1f}, p95 {self.p95:.0f}, max {self.max}"
        if self.unit == "prompt":
            return (
                f"{self.rows} rows, {self.kept} prompts kept, {dropped}; "
                f"tokens a prompt: {lengths}; at most {self.max_length}"
            )
        return (
            f"{self.rows} rows, {self.kept} kept, {self.truncated} truncated to {self.max_length}, {dropped}; "
            f"tokens a {self.unit}: {lengths}; {self.target_tokens} target tokens"
        )


def joined_stats(parts: Sequence[LengthStats]) -> LengthStats:
    """Counts and lengths of several data sets together; which rows were dropped, and why, each tells itself."""
    counts = [entry.name for entry in fields(LengthStats) if entry.type == "int" or entry.type is int]
    sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in counts if name != "max_length"}
    lengths = [length for part in parts for length in part.lengths]
    return LengthStats(parts[0].max_length, unit=parts[0].unit, lengths=lengths, **sums)
