"""Count the weights in which a run of ours and a package's checkpoint differ, block by block (LLaMA's names).

python analysis/peers/differing.py RUN_FOLDER OUT
"""

import sys
from pathlib import Path

from safetensors import safe_open

run, out = Path(sys.argv[1]), Path(sys.argv[2])
with safe_open(out / "model.safetensors", "pt") as theirs:
    for index, file in enumerate(sorted((run / "blocks").glob("block_*.safetensors"))):
        with safe_open(file, "pt") as ours:
            counts = []
            for name in (key.removesuffix(":codes") for key in ours.keys() if key.endswith(":codes")):  # noqa: SIM118
                codes, scale, zero = (ours.get_tensor(f"{name}:{part}") for part in ("codes", "scale", "zero"))
                grouped = codes.float().view(*scale.shape[:2], -1)
                weight = ((grouped - zero) * scale).view(codes.shape)
                other = theirs.get_tensor(f"model.layers.{index}.{name}")
                # A code apart is a step apart; what scales differ by is a millionth of one.
                different = (weight - other).abs() > 1e-3 * scale.mean()
                counts.append(f"{name.removesuffix('.weight')} {int(different.sum())} of {different.numel()}")
        print(f"block {index}: {', '.join(counts)}", flush=True)
