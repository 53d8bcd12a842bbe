"""Fine-tuning through the whole model is stopped at any step, and goes on to the very same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.interruption import before_rename, only_run, outcome
from helpers.marks import slow_but
from omegaconf import DictConfig

from lsiq.experiment.run import run
from lsiq.methods.finetune import progress
from lsiq.runtime.files import read_tensors

SmallRun = Callable[..., DictConfig]
DENSE = "method.part={_target_: lsiq.parts.dense.Dense, lr: 0.05, unit: step}"
SINGULAR = "method.part={_target_: lsiq.parts.singular.Singular, corner: 8, lr: 0.01}"
# 8 sequences in batches of two and two epochs: eight steps of each group, four of each window.
COMMON = ["calib.samples=8", "method.training.epochs=2", "method.training.batch=2", "eval.rtn=false"]
FORMS = {
    "all": [DENSE, "method.trained=all"],
    "window": [SINGULAR, "method.trained=window", "method.window=1", "method.window_epochs=1"],
    "grid": [DENSE, "method.trained=grid"],
    "int8": [DENSE, "method.trained=window", "method.window=1", "method.window_epochs=1", "method.states=int8"],
    "one by one": [SINGULAR, "method.together=false", "method.loss=text"],
}


class KilledError(Exception):
    """What no handler of the package waits for, so that all that is not on the disk is lost."""


@contextmanager
def states(stop: int | None = None, error: type[BaseException] = KilledError) -> Iterator[list[str]]:
    """Note each state that is written; before number `stop` gets its name an error comes, once."""
    seen: list[str] = []

    def watch(partial: Path, name: str) -> None:
        del partial
        if name == "state.safetensors":
            seen.append(name)
            if len(seen) == stop:
                raise error

    with before_rename(watch):
        yield seen


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that nothing disturbs, which several tests start from or compare with."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def parent(checkpoint: Path, small_run: SmallRun, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to start from, made once for each checkpoint; states are written before every step from here on."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr("lsiq.runtime.pace.TIMES_WRITING", 0.0)
    folder = shared / "parents"
    return folder / run(small_run(checkpoint, f"paths.runs={folder}")).run_id


def undisturbed_run(checkpoint: Path, small_run: SmallRun, shared: Path, *arguments: str) -> Path:
    """The folder of a run that is stopped nowhere: found where a test before has made it."""
    return shared / run(small_run(checkpoint, *arguments, f"paths.runs={shared}")).run_id


def steps_of(folder: Path) -> str:
    return read_tensors(folder / "unfinished" / "state.safetensors").metadata["course"]


@pytest.mark.parametrize("error", [KilledError, KeyboardInterrupt])
@pytest.mark.parametrize("form", slow_but(["window", "int8"], FORMS))
def test_training_that_was_stopped_goes_on_from_its_last_step_to_the_same_bits(
    checkpoint: Path,
    small_run: SmallRun,
    tmp_path: Path,
    shared: Path,
    parent: Path,
    form: str,
    error: type[BaseException],
) -> None:
    arguments = ["method=e2e", f"method.run={parent}", *COMMON, *FORMS[form]]
    undisturbed = undisturbed_run(checkpoint, small_run, shared, *arguments)
    all_steps = 16 if form == "one by one" else 8
    with states(stop=7, error=error), pytest.raises(error):
        run(small_run(checkpoint, *arguments))
    _, folder = only_run(tmp_path / "runs")
    # Before each step a state is written; of the seventh only Ctrl-C leaves one.
    assert f'"steps": {5 if error is KilledError else 6}' in steps_of(folder)
    with states() as written:
        run(small_run(checkpoint, *arguments))
    assert len(written) == all_steps - (5 if error is KilledError else 6)
    assert outcome(folder) == outcome(undisturbed)
    assert not (folder / "unfinished").exists()


@pytest.mark.slow
def test_a_damaged_state_or_one_of_another_form_costs_the_training_and_no_more(
    checkpoint: Path,
    small_run: SmallRun,
    tmp_path: Path,
    shared: Path,
    parent: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["method=e2e", f"method.run={parent}", *COMMON, DENSE]
    undisturbed = undisturbed_run(checkpoint, small_run, shared, *arguments)
    for damage in ("cut", "form"):
        with states(stop=4), pytest.raises(KilledError):
            run(small_run(checkpoint, *arguments, f"paths.runs={tmp_path / damage}"))
        _, folder = only_run(tmp_path / damage)
        file = folder / "unfinished" / "state.safetensors"
        again = list(arguments)
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        else:
            again.append("method.memory=1000")  # chosen anew: the same form, so the state is good
        with states() as written:
            run(small_run(checkpoint, *again, f"paths.runs={tmp_path / damage}"))
        assert len(written) == (8 if damage == "cut" else 6)
        assert ("is damaged" in capsys.readouterr().err) == (damage == "cut")
        assert outcome(folder)["stored"] == outcome(undisturbed)["stored"]
