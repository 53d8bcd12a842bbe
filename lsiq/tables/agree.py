"""Whether a study that was run again says the same.

    python -m lsiq.tables.agree analysis/records/study.jsonl again.jsonl

Compares every loss that both files have, the mean over the seeds of a configuration: two means agree if they differ by
no more than twice the larger standard deviation over seeds. Means over three seeds lie further apart than once that
deviation in a fifth of all cases by chance alone, further than twice in one of twenty-three (normal deviates, drawn).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsiq.errors import InputError, LsiqError
from lsiq.report.compact import Run, read_runs
from lsiq.tables.protocol import contradiction
from lsiq.tables.study import SEEDLESS, Sample

# Two machines add up in different orders: so much, as a share of the perplexity, is no disagreement of itself.
ROUNDING = 2e-4


@dataclass(frozen=True)
class Pair:
    """One loss, the logarithm of a perplexity, in both files.

    Attributes:
        name: model, setting, method and metric.
        allowed: how far apart the means may be.
    """

    name: str
    first: Sample
    second: Sample

    @property
    def allowed(self) -> float:
        return max(2 * (self.first.spread or 0.0), 2 * (self.second.spread or 0.0), ROUNDING)

    @property
    def agrees(self) -> bool:
        return abs(self.first.mean - self.second.mean) <= self.allowed


def pairs(first: Iterable[Run], second: Iterable[Run]) -> list[Pair]:
    """Return the losses that both collections measured of configurations that do not contradict each other.

    Raises:
        InputError: there are none.
    """
    second_groups = _configurations(second)
    result = []
    for name, groups in _configurations(first).items():
        for (settings, losses), (second_settings, second_losses) in itertools.product(
            groups, second_groups.get(name, [])
        ):
            if contradiction(settings, second_settings) is None:
                for metric in losses.keys() & second_losses.keys():
                    samples = (Sample(tuple(m[metric].values()), name[2] in SEEDLESS) for m in (losses, second_losses))
                    result.append(Pair(" ".join((*name, metric)), *samples))
    if not result:
        raise InputError("the files have no configuration in common; collect both from runs of the same sweep files")
    return sorted(result, key=lambda pair: pair.name)


# By metric and seed, the logarithm of a perplexity.
_Losses = dict[str, dict[int, float]]


def _configurations(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[tuple[dict[str, Any], _Losses]]]:
    """Return the losses by model, setting and method, for each of their configurations."""
    by_name: dict[tuple[str, str, str], list[tuple[dict[str, Any], _Losses]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.created):
        settings = {key: run.config.get(key) for key in ("calib", "method", "quant")}
        groups = by_name[run.model, run.setting, run.method]
        losses = next(
            (
                group_losses
                for group_settings, group_losses in groups
                if contradiction(group_settings, settings) is None
            ),
            None,
        )
        if losses is None:
            losses = defaultdict(dict)
            groups.append((settings, losses))
        for metric, value in run.metrics.items():
            if metric.startswith("ppl/"):
                losses[metric][run.seed] = math.log(value)
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lsiq.tables.agree", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("first", type=Path, help="a file of compact records")
    parser.add_argument("second", type=Path, help="another, of the same runs carried out again")
    args = parser.parse_args()
    try:
        result = pairs(*(read_runs(file) for file in (args.first, args.second)))
    except OSError as error:
        sys.exit(f"error: {error.filename}: cannot be read ({error.strerror}); give a file of compact records")
    except LsiqError as error:
        sys.exit(f"error: {error}")
    disagreements = [pair for pair in result if not pair.agrees]
    for pair in disagreements:
        difference = pair.second.mean - pair.first.mean
        print(f"{pair.name}: {difference:+.4f}, more than {pair.allowed:.4f}")
    print(f"{len(result) - len(disagreements)} of {len(result)} losses agree")
    sys.exit(bool(disagreements))


if __name__ == "__main__":
    main()
