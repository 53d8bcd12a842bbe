"""What is trained at once through the whole model: windows, the grid, and which of them fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configuration import compose_run
from helpers.models import load_small
from omegaconf import DictConfig

from lsiq.errors import ConfigError, ResourceError
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.methods.finetune import FineTune, loss, tuner
from lsiq.methods.finetune.form import GIB, Load, choose, kept_bytes
from lsiq.methods.finetune.optimizers import Optimizers
from lsiq.methods.finetune.tuned_block import TunedBlock
from lsiq.methods.finetune.windows import groups
from lsiq.models.shape import Shape
from lsiq.results.block_file import to_tensors
from lsiq.results.store import BlockStore
from lsiq.runtime.files import tensor_digest

SmallRun = Callable[..., DictConfig]
DENSE = "method.part={_target_: lsiq.parts.dense.Dense, lr: 0.05, unit: step}"
# LLaMA-2-7B in half precision, 128 sequences of 2048 tokens, groups of 128, trained in float32.
SEVEN_BILLION = Load(Shape(202_375_168, 4096, 11008, 32000, 262_144_000), 32, 128, 2048, 128, 2, 4)


def best(**changes: object) -> FineTune:
    method = parse(compose_run("method=best", "quant=w2a16g128")).method
    assert isinstance(method, FineTune)
    return replace(method, **changes)


@pytest.mark.parametrize(("epochs", "steps"), [(None, 30), (10, 30), (4, 12)])
def test_each_window_has_its_epochs_and_windows_cover_the_blocks_in_their_order(epochs: int | None, steps: int) -> None:
    settings = best(trained="window", window=3, window_epochs=epochs)
    (group,) = groups(settings, depth=8, samples=20)
    # 10 epochs of 3 steps; 8 blocks in three windows of which none has more than three.
    assert [list(window.blocks) for window in group.windows] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [window.steps for window in group.windows] == [range(i * steps, (i + 1) * steps) for i in range(3)]
    assert settings.weight_share == steps / 30
    (whole,) = groups(best(trained="all"), depth=8, samples=20)
    assert whole.windows == (type(whole.windows[0])(range(8), range(30)),)
    singles = groups(replace(best(), together=False, blocks=2), depth=8, samples=20)
    assert [(list(single.blocks), single.steps) for single in singles] == [([6], 30), ([7], 30)]


@pytest.mark.parametrize(
    ("room", "trained", "least", "most"), [(139, "all", 0, 0), (70, "window", 8, 16), (30, "window", 1, 3)]
)
def test_seven_billion_weights_take_the_first_form_that_fits(room: int, trained: str, least: int, most: int) -> None:
    form = choose(best(), SEVEN_BILLION, room * GIB)
    assert form.trained == trained
    assert least <= (form.window or 0) <= most
    assert form.bytes <= room * GIB


def test_where_no_window_fits_the_grid_is_trained_and_where_that_does_not_nothing_begins() -> None:
    grid = choose(best(), SEVEN_BILLION, 17 * GIB)
    assert (grid.trained, grid.window, grid.sequences) == ("grid", None, 1)
    assert not choose(best(), SEVEN_BILLION, 8 * GIB).fits
    assert choose(best(trained="window", window=4), SEVEN_BILLION, 8 * GIB).window == 4  # asked for is asked for


def test_what_blocks_leave_behind_is_estimated_above_what_it_took() -> None:
    # The 90 M rung, 8 x 512 tokens in float32, on an H200: a peak of 8.17 GiB, and of 2.81 where it is computed again.
    small = kept_bytes(Shape(6_291_456, 768, 2048, 4096, 3_145_728), 14, 12, 8, 512, 4)
    assert 8.17 - 2.81 < small / GIB < 2 * (8.17 - 2.81)  # 9.2
    assert kept_bytes(SEVEN_BILLION.shape, 32, 32, 8, 2048, 4) > 500 * GIB


def test_a_block_knows_the_shape_of_its_model(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    _, kwargs = model.embed(torch.zeros(1, 4, dtype=torch.long), batch=1)
    shape = model.block(0, kwargs).shape
    assert shape == Shape.of({"model_type": model.spec.model_type, **model.config.to_dict()})
    assert shape.width == model.config.hidden_size


def test_moments_of_8_bits_make_room_for_more_blocks_at_once() -> None:
    exact, small = (choose(best(states=states), SEVEN_BILLION, 70 * GIB) for states in ("float32", "int8"))
    # Of 16 bytes a weight 10 are left, and a 32nd of one: two windows in place of four.
    assert (exact.window, small.window) == (10, 17)
    settings = best(states="int8")
    taken = SEVEN_BILLION.trained_bytes(replace(settings, scales=None), "window", 16)
    assert taken == (10 + 1 / 32) * 16 * SEVEN_BILLION.shape.weights
    grids = [SEVEN_BILLION.bytes(best(states=states), "grid", None, 1, 70 * GIB) for states in ("float32", "int8")]
    assert grids[0] == grids[1]  # where no weights are trained there are no moments of any
    assert choose(settings, SEVEN_BILLION, 100 * GIB).trained == "all"
    assert choose(best(), SEVEN_BILLION, 100 * GIB).trained == "window"


def test_an_optimizer_holds_the_moments_of_weights_in_bytes(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, dict[torch.dtype, int]] = {}

    class Watched(Optimizers):
        def set_rates(self, settings: FineTune, step: int) -> None:
            super().set_rates(settings, step)
            counts = held.setdefault(settings.states, {})
            for optimizer in self.each:
                for state in optimizer.state.values():
                    for tensor in state.values():
                        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()

    monkeypatch.setattr(tuner, "Optimizers", Watched)
    alone = [DENSE, "method.scales=null", "method.floats=null"]
    for states in ("float32", "int8"):
        stored(checkpoint, small_run, tmp_path, *alone, f"method.states={states}")
    assert held["int8"][torch.int8] == held["int8"][torch.uint8] > 0
    assert set(held["float32"]) == {torch.float32}
    # What is left are scales and the moments of the smallest linears; measured: 0.09.
    assert held["int8"][torch.float32] < 0.1 * held["float32"][torch.float32]


def stored(checkpoint: Path, small_run: SmallRun, tmp_path: Path, *arguments: str) -> list[BlockStore]:
    """Blocks of a run by rounding and of one that fine-tunes it."""
    parent = run(small_run(checkpoint, f"paths.runs={tmp_path / 'parents'}"))
    source = f"method.run={tmp_path / 'parents' / parent.run_id}"
    child = run(small_run(checkpoint, "method=e2e", source, "method.training.epochs=2", "eval.rtn=false", *arguments))
    folders = tmp_path / "parents" / parent.run_id, tmp_path / "runs" / child.run_id
    return [BlockStore(folder / "blocks") for folder in folders]


def test_one_window_of_all_blocks_is_training_them_all(checkpoint: Path, small_run: SmallRun, tmp_path: Path) -> None:
    digests = []
    for form in ("all", "window"):
        _, store = stored(checkpoint, small_run, tmp_path, DENSE, f"method.trained={form}")
        digests.append([tensor_digest(to_tensors(store.read(index))[0]) for index in range(2)])
    assert digests[0] == digests[1]


def test_a_window_flips_codes_in_its_turn_and_step_sizes_move_everywhere(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    # Two steps in all, one for each block, and it goes beyond the edge of a cell.
    part = DENSE.replace("0.05", "0.6")
    before, after = stored(
        *(checkpoint, small_run, tmp_path, part, "method.trained=window", "method.window=1"),
        *("method.window_epochs=1", "method.training.batch=4"),
    )
    for index in range(2):
        old, new = before.read(index).weights, after.read(index).weights
        assert any(not torch.equal(old[name].codes, new[name].codes) for name in old)
        assert all(not torch.equal(old[name].scale, new[name].scale) for name in old)


def test_blocks_out_of_their_window_hold_codes_of_a_byte_and_no_weight_in_float(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[TunedBlock] = []
    held: list[list[int]] = []

    class Watched(TunedBlock):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            blocks.append(self)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            assert all(grid.codes.dtype == torch.uint8 for block in blocks for grid in block.grids.values())
            held.append([_floats(block) for block in blocks])
            return super().forward(hidden)

    monkeypatch.setattr(tuner, "TunedBlock", Watched)
    stored(checkpoint, small_run, tmp_path, DENSE, "method.trained=window", "method.window=1")
    linears = sum(grid.codes.numel() for grid in blocks[0].grids.values())
    half = len(held) // 2
    assert half > 0
    for at, numbers in enumerate(held):
        training, resting = numbers if at < half else reversed(numbers)
        assert training > linears
        assert resting < linears / 4


def _floats(block: TunedBlock) -> int:
    """Numbers that a block holds in float; those of its checkpoint's linears would count too."""
    tensors = [*block.state.parameters.values(), *block.growth.values(), *block.floats.values()]
    tensors += [*block.latents.values(), *block.block.weights.values()]
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def test_the_grid_alone_leaves_all_codes(checkpoint: Path, small_run: SmallRun, tmp_path: Path) -> None:
    before, after = stored(checkpoint, small_run, tmp_path, DENSE.replace("0.05", "0.6"), "method.trained=grid")
    for index in range(2):
        old, new = before.read(index).weights, after.read(index).weights
        assert all(torch.equal(old[name].codes, new[name].codes) for name in old)
        assert all(not torch.equal(old[name].scale, new[name].scale) for name in old)


def test_a_run_says_which_form_it_took_and_keeps_its_name(
    checkpoint: Path, small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["method=e2e", "method.run=null", "method@method.start=rtn", DENSE, "method.training.epochs=1"]
    start.append("device=cpu")  # which has no other memory in use
    with pytest.raises(
        ResourceError, match=r"method\.trained=auto: no form of rtn\+e2e fits 0\.0 GiB; the least, grid"
    ):
        run(small_run(checkpoint, *start, "method.memory=0.001"))
    record = run(small_run(checkpoint, *start))
    assert (record.training_form["trained"], record.training_form["states"]) == ("all", "float32")
    room = float(record.training_form["why"].split()[0])
    assert room < 0.2
    # A little less than what all of it takes, rounded up, is enough for one block of two.
    method = parse(small_run(checkpoint, *start)).method
    assert isinstance(method, FineTune)
    load = Load(Shape(74_000, 96, 160, 4096, 0), 2, 4, 32, 32, 4, 4)
    taken = load.bytes(method, "window", 1, 1, 10 * GIB) / GIB
    other = run(small_run(checkpoint, *start, f"method.memory={taken * 1.02}", "force=true"))
    assert other.run_id == record.run_id
    form = other.training_form
    assert (form["trained"], form["window"], form["epochs"]) == ("window", 1, 1)
    assert "trains through the whole model by window of 1 blocks, 1 epochs each" in capsys.readouterr().err


def test_logits_made_in_parts_give_the_same_loss_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 8, generator=generator)
    hidden, reference = (torch.randn(3, 7, 8, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 50, (3, 7), generator=generator)

    def logits(states: torch.Tensor) -> torch.Tensor:
        return states @ head.t()

    results = []
    for limit in (2**28, 4 * 50):
        monkeypatch.setattr(loss, "LOGITS", limit)
        leaf = hidden.clone().requires_grad_()
        total = loss.float_loss(logits, leaf, reference, 50) + loss.text_loss(logits, leaf, tokens, 50)
        total.backward()
        results.append((total.detach(), leaf.grad))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)  # measured: 0 and 1.2e-7


def test_products_in_tf32_last_as_long_as_fine_tuning(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("highest")  # whatever was trained in this process before
    seen = []
    measured = tuner.float_loss

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return measured(*arguments)

    monkeypatch.setattr(tuner, "float_loss", watched)
    for precision in ("tf32", "float32"):
        stored(checkpoint, small_run, tmp_path, f"method.training.precision={precision}")
    half = len(seen) // 2
    assert seen == [True] * half + [False] * half
    assert half > 0
    with pytest.raises(ConfigError, match="precision=tf32: is for fine-tuning through the whole model"):
        parse(compose_run("method=lsi", "method.training.precision=tf32"))


def test_a_run_says_in_how_many_bits_moments_were_and_is_another_run_with_fewer(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    start = ["method=e2e", "method.run=null", "method@method.start=rtn", DENSE.replace("0.05", "0.6")]
    start += ["method.training.epochs=2", "method.training.batch=2", "eval.rtn=false"]
    exact, small = (run(small_run(checkpoint, *start, f"method.states={states}")) for states in ("float32", "int8"))
    assert (exact.training_form["states"], small.training_form["states"]) == ("float32", "int8")
    assert exact.run_id != small.run_id
    losses = [record.blocks[0]["metrics"]["loss_last"] for record in (exact, small)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # measured: 2.4e-4


def test_auto_that_ends_with_the_grid_keeps_no_moments_of_weights() -> None:
    form = choose(best(states="int8"), SEVEN_BILLION, 17 * GIB)
    assert form.trained == "grid"
    assert form.of(best(states="int8")).states == "float32"


def test_forms_that_cannot_be_are_refused() -> None:
    for overrides, message in (
        (["method.trained=all", "method.window=2"], "window=2: trained=all has no windows"),
        (["method.trained=grid", "method.window_epochs=2"], "window_epochs=2: trained=grid has no windows"),
        (["method.states=int8"], "states=int8: part=null trains no weights; use states=float32"),
        (["method.states=int8", "method.trained=grid", DENSE], "states=int8: trained=grid trains no weights"),
        (["method.window_epochs=6"], "window_epochs=6: is more than training.epochs=5"),
        (["method.trained=window", "method.together=false"], "trained=window: together=false trains blocks one by one"),
        (["method.trained=grid", "method.scales=null", "method.floats=null", DENSE], "trained=grid: scales and floats"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(compose_run("method=e2e", "method.run=x", *overrides))
