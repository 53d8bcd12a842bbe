"""The ladder: models of one recipe at five sizes, of which `11m` is bundled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """A size of both families, and the rate and batch at which it is trained.

    The two families share width, depth and heads; the feed-forward width of OPT is the one at which both weigh the
    same. All widths are multiples of 128, so groups of 128 fit every rung.

    Attributes:
        hidden, blocks, heads: heads have 64 channels, as those of large models do.
        kv_heads: of LLaMA, so that grouped-query attention is exercised; OPT has as many as `heads`.
        llama_ffn: 8/3 of the width where that fits, the usual ratio of gated layers.
        llama_batch, opt_batch: sequences a step, over all processes together.
        llama_rate, opt_rate: peak learning rates.
    """

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    llama_ffn: int
    opt_ffn: int
    llama_batch: int
    opt_batch: int
    llama_rate: float
    opt_rate: float

    def rate_of(self, family: str) -> float:
        return self.llama_rate if family == "llama" else self.opt_rate

    def batch_of(self, family: str) -> int:
        return self.llama_batch if family == "llama" else self.opt_batch


# Rates that were tried: 11m (both families), 30m (OPT), 90m and 300m (LLaMA; 12 and 24 blocks with 8192 pieces). The
# others lie between or follow them: OPT, which has neither gates nor RMSNorm, takes two thirds of LLaMA's, and at 30m
# as much. There half the batch, so twice the steps, served OPT (docs/ladder.md); its 90m follows untried. At 300m both
# families have it: within the same time the steps count for more than their noise.
LADDER = {
    "3m": Rung(256, 4, 4, 2, llama_ffn=512, opt_ffn=640, llama_batch=64, opt_batch=64, llama_rate=3e-3, opt_rate=2e-3),
    # 22 MB in bfloat16: small enough to ship in a repository, large enough to write English.
    "11m": Rung(
        384, 6, 6, 2, llama_ffn=1024, opt_ffn=1280, llama_batch=64, opt_batch=64, llama_rate=3e-3, opt_rate=2e-3
    ),
    "30m": Rung(
        512, 10, 8, 4, llama_ffn=1408, opt_ffn=1792, llama_batch=64, opt_batch=32, llama_rate=2e-3, opt_rate=2e-3
    ),
    "90m": Rung(
        768, 14, 12, 4, llama_ffn=2048, opt_ffn=2560, llama_batch=64, opt_batch=32, llama_rate=1.2e-3, opt_rate=8e-4
    ),
    "300m": Rung(
        1024, 24, 16, 8, llama_ffn=2816, opt_ffn=3712, llama_batch=32, opt_batch=32, llama_rate=8e-4, opt_rate=5e-4
    ),
}
