"""A device that runs out of memory costs time, never the run or its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interruption import only_run
from helpers.marks import slow_but
from helpers.summation import ORDER_OF_SUMMATION, learned_difference
from omegaconf import DictConfig
from torch import Tensor

from lsiq.errors import ResourceError
from lsiq.experiment.run import run
from lsiq.methods.finetune import tuner
from lsiq.methods.finetune.tuned_block import TunedBlock
from lsiq.models import block as block_module
from lsiq.results.store import BlockStore

SmallRun = Callable[..., DictConfig]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the device room for so many sequences in a block, which a CPU cannot be short of by itself.

    The error comes out of the layer of transformers, as the allocator's would, and after what was done before it.
    """
    call = block_module.functional_call

    def limit(sequences: int) -> None:
        def short(module: torch.nn.Module, weights: dict[str, Tensor], args: tuple[Tensor, ...], kwargs: Any) -> Any:
            out = call(module, weights, args, kwargs)
            if len(args[0]) > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return out

        monkeypatch.setattr(block_module, "functional_call", short)

    return limit


# In bfloat16 another order of summation flips codes.
BATCH = ("method.training.batch=4", "method.training.precision=float32")
START = "method.start.training.precision=float32"
E2E = ["method=e2e", "method.run=null", "method@method.start=lwc"]
METHODS = {
    "rtn": ["method=rtn"],
    "gptq": ["method=gptq"],
    "awq": ["method=awq"],
    "lsi": ["method=lsi", "method.training.epochs=2", *BATCH],
    "ahead": ["method=sde", "method.training.epochs=1", "method.training.ahead.blocks=1", *BATCH],
    "e2e": [*E2E, "method.start.training.epochs=1", "method.training.epochs=1", START],
}
# Where a code flips, metrics move as far as where a sequence is lost; what the first block learns does not.
LEARNED = ("lsi", "ahead")


@pytest.mark.parametrize("name", slow_but(["gptq", "lsi"], METHODS))
def test_out_of_memory_halves_what_passes_at_once_with_the_same_result(
    checkpoints: dict[str, Path],
    small_run: SmallRun,
    tmp_path: Path,
    room: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    arguments = [*METHODS[name], "calib.samples=8", "calib.batch=4"]
    plenty = run(small_run(checkpoints["llama"], *arguments, f"paths.runs={tmp_path / 'other'}"))
    assert "out of memory" not in capsys.readouterr().err
    room(1)
    short = run(small_run(checkpoints["llama"], *arguments))
    assert "CUDA out of memory" in (said := capsys.readouterr().err)
    assert "1 sequences at a time from here on" in said
    if name in LEARNED:
        assert learned_difference(tmp_path / "other" / plenty.run_id, tmp_path / "runs" / short.run_id) <= (
            ORDER_OF_SUMMATION
        )
        assert short.metrics["ppl/file@64"] == pytest.approx(plenty.metrics["ppl/file@64"], rel=0.02)
        return
    for key, value in plenty.metrics.items():  # measured: 0 without training, 3e-6 with
        assert short.metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("form", slow_but(["window"], ["all", "window", "kept"]))
def test_out_of_memory_while_weights_are_fine_tuned_halves_the_batch_and_they_flip_as_before(
    checkpoints: dict[str, Path],
    small_run: SmallRun,
    tmp_path: Path,
    room: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    if form == "kept":  # what blocks compute, as on a GPU with room for it
        monkeypatch.setattr(tuner, "TunedBlock", lambda *given: TunedBlock(*given[:-1], recomputes=False))
    parent = run(small_run(checkpoints["llama"], "calib.samples=5", f"paths.runs={tmp_path / 'parents'}"))
    # One step of Adam moves a weight by its rate, which is beyond the edge of a cell: codes say the gradient's sign.
    part = "method.part={_target_: lsiq.parts.dense.Dense, lr: 0.6, unit: step}"
    arguments = ["method=e2e", f"method.run={tmp_path / 'parents' / parent.run_id}", part, "calib.samples=5"]
    arguments += [
        f"method.trained={'window' if form == 'window' else 'all'}",
        "method.training.epochs=1",
        "method.training.batch=5",
    ]
    arguments += ["method.window=1"] if form == "window" else []
    codes = []
    for name, sequences in (("plenty", 100), ("short", 3)):  # the halves of a batch of five are not alike
        room(sequences)
        record = run(small_run(checkpoints["llama"], *arguments, f"paths.runs={tmp_path / name}"))
        said = "fine-tuning: CUDA out of memory; 3 sequences at a time" in capsys.readouterr().err
        assert said == (name == "short")
        codes.append(stored_codes(tmp_path / name / record.run_id))
    before = stored_codes(tmp_path / "parents" / parent.run_id)
    flipped, differing = ((one != codes[0]).float().mean().item() for one in (before, codes[1]))
    assert flipped > 0.5
    assert differing < 0.01  # measured: 0


def stored_codes(folder: Path) -> torch.Tensor:
    """All codes of a run of two blocks."""
    store = BlockStore(folder / "blocks")
    return torch.cat([weight.codes.flatten() for index in range(2) for weight in store.read(index).weights.values()])


def test_no_room_for_one_sequence_is_said_and_keeps_the_blocks(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, room: Callable[[int], None]
) -> None:
    undisturbed = run(small_run(checkpoints["llama"], f"paths.runs={tmp_path / 'other'}"))
    room(0)
    with pytest.raises(ResourceError, match=r"out of memory with one sequence at a time.* the same command"):
        run(small_run(checkpoints["llama"]))
    record, _ = only_run(tmp_path / "runs")
    assert record.status == "failed"
    room(100)
    assert run(small_run(checkpoints["llama"])).metrics == undisturbed.metrics


def test_no_room_to_fine_tune_one_sequence_names_a_smaller_form(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, room: Callable[[int], None]
) -> None:
    parent = run(small_run(checkpoints["llama"], f"paths.runs={tmp_path / 'other'}"))
    source = f"method.run={tmp_path / 'other' / parent.run_id}"
    room(0)
    for form, smaller in (("all", "method.trained=window"), ("grid", "this is the least form")):
        with pytest.raises(ResourceError, match=rf"fine-tuning: CUDA out of memory with one sequence.*; .*{smaller}"):
            run(small_run(checkpoints["llama"], "method=e2e", source, "method.loss=text", f"method.trained={form}"))
