"""Bin packing: which groups of rows share a micro-batch of at most `capacity` tokens.

Every function takes group lengths in tokens and returns bins, lists of group positions; each position is in exactly
one bin. A group longer than the capacity gets a bin of its own. All are deterministic.
"""

import random
from collections.abc import Callable, Iterable, Sequence

Bins = list[list[int]]


def concatenative(lengths: Sequence[int], capacity: int, seed: int = 0) -> Bins:
    """Keep the order; open a new bin when the next group does not fit."""
    bins: Bins = []
    used = capacity + 1
    for position, length in enumerate(lengths):
        if used + length > capacity:
            bins.append([])
            used = 0
        bins[-1].append(position)
        used += length
    return bins


def first_fit_decreasing(lengths: Sequence[int], capacity: int, seed: int = 0) -> Bins:
    """Longest group first, each into the first bin with room."""
    return _first_fit(_by_decreasing_length(lengths), lengths, capacity)


def first_fit_shuffle(lengths: Sequence[int], capacity: int, seed: int = 0) -> Bins:
    """Groups in an order shuffled with `seed`, each into the first bin with room."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    return _first_fit(order, lengths, capacity)


def modified_first_fit_decreasing(lengths: Sequence[int], capacity: int, seed: int = 0) -> Bins:
    """Johnson and Garey 1985: at most 71/60 of the fewest possible bins (first-fit-decreasing: 11/9).

    Groups over half the capacity open bins; groups over a third join them where they fit; then, from the emptiest
    such bin, two groups of a sixth to a third share what is left; first-fit-decreasing places the rest.
    """
    order = _by_decreasing_length(lengths)
    large = [p for p in order if 2 * lengths[p] > capacity]
    medium = [p for p in order if capacity < 3 * lengths[p] and 2 * lengths[p] <= capacity]
    small = [p for p in order if capacity < 6 * lengths[p] and 3 * lengths[p] <= capacity]
    tiny = [p for p in order if 6 * lengths[p] <= capacity]

    bins: Bins = [[position] for position in large]
    room = [capacity - lengths[position] for position in large]

    def place(bin_number: int, position: int, source: list[int]) -> None:
        source.remove(position)
        bins[bin_number].append(position)
        room[bin_number] -= lengths[position]

    for number in range(len(bins)):
        fitting = _first_that_fits(medium, lengths, room[number])
        if fitting is not None:
            place(number, fitting, medium)
    for number in reversed(range(len(bins))):
        if len(bins[number]) > 1 or len(small) < 2:
            continue
        if lengths[small[-1]] + lengths[small[-2]] <= room[number]:
            place(number, small[-1], small)
            partner = _first_that_fits(small, lengths, room[number])
            assert partner is not None
            place(number, partner, small)
    rest = sorted(medium + small + tiny, key=lambda p: (-lengths[p], p))
    return _first_fit(rest, lengths, capacity, bins, room)


def sorted_by_length(lengths: Sequence[int], capacity: int, seed: int = 0) -> Bins:
    """Dynamic batching: groups of like length together, where a bin costs groups x longest group.

    That is the memory a padded batch would take; here it keeps attention's cost even within a micro-batch.
    """
    bins: Bins = []
    for position in sorted(range(len(lengths)), key=lambda p: (lengths[p], p)):
        # Lengths rise, so the group being placed is the longest of its bin.
        if not bins or (len(bins[-1]) + 1) * lengths[position] > capacity:
            bins.append([])
        bins[-1].append(position)
    return bins


PACKING_ALGORITHMS: dict[str, Callable[[Sequence[int], int, int], Bins]] = {
    "concatenative": concatenative,
    "first_fit_decreasing": first_fit_decreasing,
    "first_fit_shuffle": first_fit_shuffle,
    "modified_first_fit_decreasing": modified_first_fit_decreasing,
}


def _by_decreasing_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))


def _first_that_fits(candidates: Iterable[int], lengths: Sequence[int], room: int) -> int | None:
    return next((position for position in candidates if lengths[position] <= room), None)


def _first_fit(
    order: Iterable[int],
    lengths: Sequence[int],
    capacity: int,
    bins: Bins | None = None,
    room: list[int] | None = None,
) -> Bins:
    """First fit in the given order, into `bins` (with `room` tokens left in each) and new ones after them."""
    bins = [] if bins is None else bins
    room = [] if room is None else room
    for position in order:
        length = lengths[position]
        target = next((number for number, free in enumerate(room) if length <= free), None)
        if target is None:
            bins.append([])
            room.append(capacity)
            target = len(bins) - 1
        bins[target].append(position)
        room[target] -= length
    return bins
