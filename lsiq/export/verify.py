"""Reading an export back: the logits of the foreign loader against those of the run's own model."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsiq.data.tokens import random_windows
from lsiq.errors import OutputError
from lsiq.export.base import TOLERANCE, Exporter, Loader, Logits, installed
from lsiq.export.source import Source, decoded
from lsiq.models.block import run_stream
from lsiq.models.loading import Model, load
from lsiq.models.outside import with_outside
from lsiq.models.settings import ModelSettings
from lsiq.runtime.terminal import say, warn

# Tokens that are compared: random ones, for every id counts the same.
_WINDOWS, _SEQLEN = 4, 64


def as_logits(model: nn.Module) -> Logits:
    """Return a transformers model as a function of token ids."""
    model.eval()

    @torch.no_grad()
    def run(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits.float()

    return run


def verify(exporter: Exporter, source: Source, model: ModelSettings, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Read `folder` with every foreign loader that is installed; return what each found.

    Everything runs in float32 on the CPU. `difference` is the largest between the loader's logits and those of the
    weights that were to be stored, and has to stay within `TOLERANCE`; `rounding` is the largest between the latter
    and the run's own, 0 unless the settings asked for rounding. Activations stay in float on both sides: rounding them
    turns differences of one part in a million into steps of a whole level.

    Args:
        model, seed: of the run, to load its model again in float32.

    Raises:
        OutputError: the loader fails, or reads another model than was written.
    """
    tokens = random_windows(source.model.config.vocab_size, _WINDOWS, _SEQLEN, 0)
    run, stored = _logits(
        exporter, source, load(replace(model, dtype="float32"), source.checkpoint, torch.device("cpu"), seed), tokens
    )
    reports = []
    for loader in exporter.loaders:
        versions = installed(loader.packages)
        name = ", ".join(f"{package} {version}" if version else package for package, version in versions.items())
        if missing := [package for package, version in versions.items() if version is None]:
            warn(f"export={exporter.name} was not read back: {', '.join(missing)} is not installed")
            reports.append({"loader": name, "status": "skipped", "reason": f"{', '.join(missing)} is not installed"})
            continue
        difference = (_load(loader, exporter, folder)(tokens) - stored).abs().max().item()
        if not difference <= TOLERANCE:
            raise OutputError(
                f"export={exporter.name}: read back by {name}, its logits differ by {difference:.3g} from those "
                f"written (at most {TOLERANCE}); {folder} is kept to look at, and should not be used"
            )
        rounding = (stored - run).abs().max().item()
        rounded = f", and from the run's own by {rounding:.2g} of rounding" if rounding > 0 else ""
        say(f"read back by {name}: logits differ by {difference:.2g}{rounded}")
        reports.append(
            {
                "loader": name,
                "status": "read",
                "difference": difference,
                "rounding": rounding,
                "tolerance": TOLERANCE,
                "largest_logit": stored.abs().max().item(),
                "windows": list(tokens.shape),
            }
        )
    return reports


def _load(loader: Loader, exporter: Exporter, folder: Path) -> Logits:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to those who load a model for use
            return loader.load(folder)
    except Exception as error:  # each loader has its own kinds
        raise OutputError(
            f"export={exporter.name}: {', '.join(loader.packages)} cannot read it back "
            f"({type(error).__name__}: {error}); {folder} is kept to look at; export.verify=false leaves this out"
        ) from error


@torch.no_grad()
def _logits(exporter: Exporter, source: Source, model: Model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32 of the run's model `model`, and of the weights that the exporter stores."""
    outside = source.outside_result()
    model = with_outside(model, decoded(outside))
    as_stored = with_outside(model, {name: x.float() for name, x in exporter.stored(outside).items()})
    run, kwargs = model.embed(tokens, _WINDOWS)
    stored, _ = as_stored.embed(tokens, _WINDOWS)
    exact = torch.equal(stored, run)
    for index in range(model.depth):
        block = model.block(index, kwargs)
        result = source.store.read(index)
        weights = {name: tensor.float() for name, tensor in exporter.stored(result).items()}
        exact = exact and all(torch.equal(weights[name], tensor) for name, tensor in decoded(result).items())
        if not exact:
            stored = run_stream(block.with_weights(weights), stored, _WINDOWS, model.device)
        run = run_stream(block.with_result(result), run, _WINDOWS, model.device)
        if exact:
            stored = run
    return model.logits(run), as_stored.logits(stored)
