"""Length statistics of a tokenized data set."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class LengthStats:
    """What tokenizing a data set did.

    lengths: tokens of every sequence (two for a pair) as tokenized, before truncation. rows: what was read.
    truncated, dropped_long (beyond the limit), dropped_equal (pairs with one answer twice), dropped_bad (hub rows that
    cannot be used): counts of rows. target_tokens: tokens that carry loss in what was kept.
    """

    max_length: int
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_equal: int = 0
    dropped_bad: int = 0
    target_tokens: int = 0
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

    def describe(self) -> str:
        """One line for the log."""
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
        return (
            f"{self.rows} rows, {self.kept} kept, {self.truncated} truncated to {self.max_length}, {dropped}; "
            f"tokens a sequence: min {self.min}, mean {self.mean:.1f}, p95 {self.p95:.0f}, max {self.max}; "
            f"{self.target_tokens} target tokens"
        )
