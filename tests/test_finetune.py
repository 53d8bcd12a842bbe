"""Fine-tuning starts from a finished run, bit for bit, and teaches it a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.run import run
from lsiq.store import BlockStore

SmallRun = Callable[..., DictConfig]
TUNE = ("method=lsi-finetune", "method.training.batch=2")


@pytest.mark.parametrize("parent_method", ["rtn", "smoothquant", "lwc"])
def test_without_epochs_the_parent_comes_back_bit_for_bit(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, parent_method: str
) -> None:
    epochs = ["method.training.epochs=1"] if parent_method == "lwc" else []
    parent = run(small_run(checkpoint, f"method={parent_method}", *epochs))
    child = run(small_run(checkpoint, *TUNE, "method.training.epochs=0", f"method.run={parent.run_id}"))
    assert child.metrics["ppl/file@64"] == parent.metrics["ppl/file@64"]
    before, after = (BlockStore(tmp_path / "runs" / r.run_id / "blocks").read(1) for r in (parent, child))
    assert all(torch.equal(before.weights[n].codes, after.weights[n].codes) for n in before.weights)


def test_training_lowers_the_loss_on_its_text_and_leaves_early_blocks_alone(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    parent = run(small_run(checkpoint))
    child = run(
        small_run(
            checkpoint,
            *TUNE,
            "method.training.epochs=8",
            "method.part.lr=0.01",
            "method.blocks=1",
            f"method.run={tmp_path / 'runs' / parent.run_id}",
        )
    )
    assert child.metrics["ppl/file@64"] < 0.98 * parent.metrics["ppl/file@64"]
    assert child.inputs["method.run"] == parent.run_id
    metrics = child.blocks[1]["metrics"]
    assert metrics["loss_last"] < metrics["loss_first"]
    assert 0 < metrics["flip_rate"] < 0.5
    before, after = (BlockStore(tmp_path / "runs" / r.run_id / "blocks").read(0) for r in (parent, child))
    assert all(torch.equal(before.weights[n].codes, after.weights[n].codes) for n in before.weights)


def test_a_run_that_does_not_fit_is_refused(checkpoint: Path, small_run: SmallRun) -> None:
    with pytest.raises(InputError, match=r"method\.run=nothing: no record there"):
        run(small_run(checkpoint, *TUNE, "method.run=nothing"))
    parent = run(small_run(checkpoint))
    with pytest.raises(InputError, match=r"was quantised to 3 bits in groups of 32; give the same quant="):
        run(small_run(checkpoint, *TUNE, f"method.run={parent.run_id}", "quant.weight.bits=4"))
