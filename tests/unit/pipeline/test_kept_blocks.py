"""Float blocks that a GPU keeps, tried on a CPU: nothing changes them, and results are those of blocks read anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configuration import CONF
from helpers.interruption import outcome
from helpers.marks import slow_but
from omegaconf import DictConfig

from lsiq.experiment.run import run
from lsiq.pipeline import block_loop
from lsiq.pipeline.block_loop import _Blocks

SmallRun = Callable[..., DictConfig]
# All but those that start from another run.
METHODS = sorted(
    file.stem for file in (CONF / "method").glob("*.yaml") if not re.search(r"^run:", file.read_text(), re.MULTILINE)
)
SHORT = {
    "best": [f"method.weight_only.{at}training.epochs=1" for at in ("start.", "")],
    "duquant": ["method.steps=8"],
}


@pytest.mark.parametrize("method", slow_but(["best", "gptq"], METHODS))
def test_what_is_kept_of_the_float_model_stays_as_it_was_read(
    method: str, checkpoint: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[_Blocks] = []

    def keeping(*arguments: Any) -> _Blocks:
        made.append(_Blocks(*arguments[:3], kept={}))  # as on a GPU with room for them
        return made[-1]

    outcomes = []
    for folder in (tmp_path / "read", tmp_path / "kept"):
        record = run(small_run(checkpoint, f"method={method}", *SHORT.get(method, ()), f"paths.runs={folder}"))
        outcomes.append(outcome(folder / record.run_id))
        monkeypatch.setattr(block_loop, "_Blocks", keeping)
    assert outcomes[0] == outcomes[1]
    blocks = made[-1]
    assert blocks.kept is not None
    assert sorted(blocks.kept) == [0, 1]
    for index, block in blocks.kept.items():
        read = blocks.model.block(index, blocks.kwargs).weights
        assert all(torch.equal(weight, read[name]) for name, weight in block.weights.items())
        assert not any(weight.requires_grad for weight in block.weights.values())
