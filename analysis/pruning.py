"""Whether block losses tell early which trials of a search are hopeless: `python analysis/pruning.py`.

For each model, format and method of analysis/searches/learned-rates.jsonl: Spearman's rank correlation of the error of
the first, the middle and the last block with the excess on each text, the share of trials that a pruner would stop
which lets only the better half by the last block's error go on, and whether it would stop the best one.
"""

import collections
import json
from pathlib import Path

from scipy.stats import spearmanr

TEXTS = {"bundled@512": "calibration's kind", "file@512": "WikiText-2"}
FEWEST = 5


def main() -> None:
    studies = collections.defaultdict(dict)
    for line in (Path(__file__).parent / "searches" / "learned-rates.jsonl").read_text().splitlines():
        run = json.loads(line)
        chosen = dict(override.split("=", 1) for override in run["overrides"])
        # A setting that was run twice with the same result counts once.
        same = json.dumps([run["block_errors"], run["metrics"]])
        for method in ("all", chosen["method"]):
            studies[chosen["model"], chosen["quant"], method][same] = run
    print("| model | format | method | runs | text | first block | middle | last | best is pruned |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (model, quant, method), found in sorted(studies.items()):
        runs = list(found.values())
        if len(runs) < FEWEST:
            continue
        for key, text in TEXTS.items():
            excess = [run["metrics"][f"excess/{key}"] for run in runs]
            errors = [run["block_errors"] for run in runs]
            ranks = [spearmanr([e[block] for e in errors], excess)[0] for block in (0, len(errors[0]) // 2, -1)]
            last = [e[-1] for e in errors]
            best = last[excess.index(min(excess))]
            pruned = "yes" if best > sorted(last)[(len(last) - 1) // 2] else "no"
            cells = [model, quant, method, str(len(runs)), text, *(f"{rank:.2f}" for rank in ranks), pruned]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
