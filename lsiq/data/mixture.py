"""How the samples of a mixture are shared out among its corpora."""

from __future__ import annotations

import math
from collections.abc import Mapping


def apportion(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Return how many of `samples` each name gets: in proportion to its weight, by the largest remainder.

    The counts sum to `samples`; what rounding down leaves over goes to the names whose exact share lost most, of equals
    to the first.
    """
    total = math.fsum(weights.values())
    exact = {name: weight / total * samples for name, weight in weights.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: samples - sum(counts.values())]:
        counts[name] += 1
    return counts
