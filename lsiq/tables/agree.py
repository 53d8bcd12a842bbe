"""Whether a study that was run again says the same.

    python -m lsiq.tables.agree analysis/records/study.jsonl again.jsonl

Compares every loss that both files have, the mean over the seeds of a configuration: two means agree if they differ by
no more than the larger standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lsiq.errors import InputError, LsiqError
from lsiq.tables.runs import Run, read_runs
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
        return max(self.first.spread or 0.0, self.second.spread or 0.0, ROUNDING)

    @property
    def agrees(self) -> bool:
        return abs(self.first.mean - self.second.mean) <= self.allowed


def pairs(first: Iterable[Run], second: Iterable[Run]) -> list[Pair]:
    """Return the losses that both collections measured.

    Raises:
        InputError: there are none.
    """
    one, other = _losses(first), _losses(second)
    found = [Pair(" ".join(key[:4]), one[key], other[key]) for key in one if key in other]
    if not found:
        raise InputError("the files have no configuration in common; collect both from runs of the same sweep files")
    return found


def _losses(runs: Iterable[Run]) -> dict[tuple[str, ...], Sample]:
    by_seed: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run.created):
        settings = json.dumps({key: run.config.get(key) for key in ("calib", "method", "quant")}, sort_keys=True)
        for metric, value in run.metrics.items():
            if metric.startswith("ppl/"):
                by_seed[run.model, run.setting, run.method, metric, settings][run.seed] = math.log(value)
    return {key: Sample(tuple(seeds.values()), key[2] in SEEDLESS) for key, seeds in by_seed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lsiq.tables.agree", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("first", type=Path, help="a file of compact records")
    parser.add_argument("second", type=Path, help="another, of the same runs carried out again")
    given = parser.parse_args()
    try:
        found = pairs(*(read_runs(file) for file in (given.first, given.second)))
    except OSError as error:
        sys.exit(f"error: {error.filename}: cannot be read ({error.strerror}); give a file of compact records")
    except LsiqError as error:
        sys.exit(f"error: {error}")
    apart = [pair for pair in found if not pair.agrees]
    for pair in apart:
        difference = pair.second.mean - pair.first.mean
        print(f"{pair.name}: {difference:+.4f}, more than {pair.allowed:.4f}")
    print(f"{len(found) - len(apart)} of {len(found)} losses agree")
    sys.exit(bool(apart))


if __name__ == "__main__":
    main()
