"""Where an FP8 cache costs what it costs: `python analysis/fp8_cache.py MODEL TEXT`, such as tiny-opt wiki.valid.raw.

First, on 16 windows of the bundled calibration text, of each block of the float model: how much of the mean square of
keys and of values is that of each channel's mean over all tokens, and how many standard deviations the median channel's
mean is. What all keys have in common shifts all scores of a query alike, and softmax does not see it.

Then, on the first 60 windows of TEXT, the mean loss over the float model's with parts of the cache in FP8 (e4m3), under
a scale of 1 and with a scale for each token and head. "Less the mean": each channel's mean on the calibration text is
taken from the keys before they are rounded and added afterwards.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lsiq
from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.evals.perplexity import perplexity
from lsiq.formats.activation import Activation
from lsiq.formats.key_value import KeyValue, Running
from lsiq.models.block import Block, run_stream
from lsiq.models.loading import Model

SEQLEN, BATCH, SEEN, WINDOWS = 512, 4, 16, 60
Fake = Callable[[Tensor], Tensor]


class Cache(Running):
    """What runs a block with any functions in place of a format's rounding."""

    def __init__(self, of_keys: Fake, of_values: Fake) -> None:
        super().__init__(Activation(), KeyValue(bits=8))
        self.__dict__.update(of_keys=of_keys, of_values=of_values)

    def fake_keys(self, x: Tensor) -> Tensor:
        return self.__dict__["of_keys"](x)

    def fake_values(self, x: Tensor) -> Tensor:
        return self.__dict__["of_values"](x)


def look(model: Model, windows: Tensor) -> list[Tensor]:
    """Print the distributions of keys and values by block; return the keys' means `(heads, 1, channels)`."""
    hidden, kwargs = model.embed(windows, BATCH)
    means = []
    print(
        "| block | | largest | root mean square | of the channels' means | mean over deviation | largest mean, bias |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for index in range(model.depth):
        seen: dict[str, list[Tensor]] = {"keys": [], "values": []}
        kept = {name: lambda x, parts=parts: (parts.append(x), x)[1] for name, parts in seen.items()}
        block = model.block(index, kwargs)
        function = block.with_weights({}, Cache(kept["keys"], kept["values"]))
        hidden = run_stream(function, hidden, BATCH, model.device)
        for name, parts in seen.items():
            x = torch.cat(parts)
            mean, power = x.mean((0, 2), keepdim=True), x.square().mean()
            deviations = (mean.abs() / x.std((0, 2), keepdim=True)).median()
            share = mean.square().mean() / power
            bias = block.weights.get(f"self_attn.{name[0]}_proj.bias", torch.zeros(1)).abs().max()
            print(
                f"| {index} | {name} | {x.abs().max():.1f} | {power.sqrt():.2f} | {share:.1%} | {deviations:.2f} | "
                f"{mean.abs().max():.1f}, {bias:.1f} |"
            )
            means += [mean[0]] if name == "keys" else []
    return means


def main(name: str, path: str) -> None:
    model = lsiq.load_model(name).model
    calibration = cut_windows(read_corpus("bundled", "calibration", None), model.tokenizer, SEQLEN, "bundled")
    windows = cut_windows(read_corpus("file", "evaluation", path), model.tokenizer, SEQLEN, path)[:WINDOWS]
    means = look(model, calibration[:SEEN])

    def loss(function_of: Callable[[Block], Callable[..., Tensor]]) -> float:
        return perplexity(model, windows, BATCH, function_of, lambda: None).loss  # type: ignore[arg-type]

    exact = loss(lambda block: block.with_weights({}))
    print(f"\n| in FP8 ({name}, {Path(path).name}, float loss {exact:.4f}) | scale of 1 | of each token and head |")
    print("| --- | --- | --- |")
    rounders = [KeyValue(format="fp8", scale=1.0).fake, KeyValue(format="fp8").fake]

    def same(x: Tensor) -> Tensor:
        return x

    def row(label: str, cache_of: Callable[[int, Fake], Cache]) -> None:
        excess = [
            loss(lambda block, fake=fake: block.with_weights({}, cache_of(block.index, fake))) - exact
            for fake in rounders
        ]
        print(f"| {label} | {excess[0]:.4f} | {excess[1]:.4f} |", flush=True)

    row("keys and values", lambda _, fake: Cache(fake, fake))
    row("values", lambda _, fake: Cache(same, fake))
    row("keys", lambda _, fake: Cache(fake, same))
    for place in range(model.depth):
        row(f"keys of block {place}", lambda at, fake, only=place: Cache(fake if at == only else same, same))
    row("keys, less the mean", lambda at, fake: Cache(lambda x: fake(x - means[at]) + means[at], same))


if __name__ == "__main__":
    main(*sys.argv[1:])
