"""Runs on a GPU, from the command's settings to the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from omegaconf import DictConfig

from lsiq.calib.gram import output_error
from lsiq.errors import ConfigError
from lsiq.experiment.run import run
from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.learning.measure import measure
from lsiq.learning.schedule import RelativeTo
from lsiq.methods.gptq.columns import choose_kernels, factorise, round_with_feedback
from lsiq.models.result import BlockResult
from lsiq.results.store import BlockStore
from lsiq.runtime.device import find_device

SmallRun = Callable[..., DictConfig]
METHODS = {
    "rtn": ["method=rtn"],
    "gptq": ["method=gptq"],
    "awq": ["method=awq"],
    "qera": ["method=qera-exact", "method.rank=4"],
    "lsi": ["method=lsi", "method.training.epochs=2"],
    "ahead": ["method=sde", "method.training.epochs=1", "method.training.ahead.blocks=1"],
    "relative": ["method=sde", "method.training.epochs=1", "method.training.relative_to=both"],
    "best": ["method=best", "method.weight_only.start.training.epochs=1", "method.weight_only.training.epochs=1"],
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_on_a_gpu_ends_where_one_on_a_cpu_does(
    name: str, device: str, checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    there = run(small_run(checkpoints["llama"], *METHODS[name], f"device={device}"))
    here = run(small_run(checkpoints["llama"], *METHODS[name], "device=cpu", f"paths.runs={tmp_path / 'cpu'}"))
    assert there.machine["device"] == "cuda"
    # Another order of summation flips codes of so small a model: on an H200 the largest difference of a block was 4e-4
    # (rtn), 2e-4 (qera), 6e-3 (best), 1.1e-2 (awq), 2.2e-2 (gptq); of lsi and sde only that it is below this is known.
    assert [row["error"] for row in there.blocks] == pytest.approx([row["error"] for row in here.blocks], rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_evaluation_in_tf32_says_so_and_is_close_to_float32(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    plain = [checkpoints["llama"], "method=rtn", "model.dtype=float32"]
    exact = run(small_run(*plain))
    fast = run(small_run(*plain, "eval.tf32=true", f"paths.runs={tmp_path / 'tf32'}"))
    assert {text["dtype"] for text in exact.protocol.values()} == {"float32"}
    assert {text["dtype"] for text in fast.protocol.values()} == {"tf32"}
    assert not torch.backends.cuda.matmul.allow_tf32
    for key, value in exact.metrics.items():
        if "ppl/" in key:
            assert fast.metrics[key] == pytest.approx(value, rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_of_fine_tuning_is_the_step_it_records(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    epochs = ["method.weight_only.start.training.epochs=1", "method.weight_only.training.epochs=8"]
    best = [checkpoints["llama"], "method=best", *epochs]
    recorded = run(small_run(*best))
    plain = run(small_run(*best, "+method.weight_only.training.graphs=false", f"paths.runs={tmp_path / 'plain'}"))
    # The optimizer of recorded steps is one kernel, whose sums are in another order.
    losses = [[row["metrics"]["loss_last"] for row in record.blocks] for record in (recorded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != [row["metrics"]["loss_first"] for row in recorded.blocks]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group", "symmetric", "act_order", "static"),
    [(128, False, True, True), (64, True, True, True), (32, False, False, False), (None, False, True, True)],
)
def test_gptq_on_a_gpu_rounds_the_same_with_its_kernel_and_without(
    bits: int,
    group: int | None,
    symmetric: bool,
    act_order: bool,
    static: bool,
    precision: Literal["float32", "float64"],
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(600, 1152, generator=generator, device="cuda") * 0.02
    mixing = torch.eye(1152, device="cuda") + torch.randn(1152, 1152, generator=generator, device="cuda") / 1152**0.5
    x = (torch.randn(4096, 1152, generator=generator, device="cuda") @ mixing).double()
    x[:, ::97] *= 6
    gram = x.t() @ x / len(x)
    curvature = factorise(gram, act_order, 0.01, precision, "layer")
    fmt = Integer(bits=bits, group=group, symmetric=symmetric)
    kernels = choose_kernels("auto", w, fmt)
    assert kernels == "triton"
    plain, fused = (round_with_feedback(w, curvature, fmt, static, 128, way) for way in ("plain", kernels))
    # One order of operations: codes differ only where a compiler of torch's made two roundings one. Eight bits have
    # the most boundaries, and each code that falls the other way moves others after it.
    assert (plain.codes == fused.codes).double().mean() >= (0.9999 if bits < 8 or precision == "float64" else 0.999)
    expected = output_error(w, plain.decode(), gram)
    assert output_error(w, fused.decode(), gram) == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_the_record_of_a_gpu_says_what_rounded_gptqs_columns(
    kernels: str, checkpoints: dict[str, Path], small_run: SmallRun
) -> None:
    record = run(small_run(checkpoints["llama"], "method=gptq", f"method.kernels={kernels}"))
    expected = "triton" if kernels == "auto" else "plain"
    assert [row["kernels"] for row in record.blocks] == [expected] * len(record.blocks)


def test_tf32_is_refused_where_nothing_is_multiplied_in_it(checkpoints: dict[str, Path], small_run: SmallRun) -> None:
    with pytest.raises(ConfigError, match=r"eval\.tf32=true: is for float32 models on a GPU, not float32 on cpu"):
        run(small_run(checkpoints["llama"], "method=rtn", "eval.tf32=true", "model.dtype=float32", "device=cpu"))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_named_without_its_number_gets_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert find_device(name) == torch.device("cuda", 0)  # set_device refuses one without a number


@pytest.mark.parametrize("form", get_args(RelativeTo))
def test_levels_of_a_stream_are_found_where_the_stream_lies(form: RelativeTo) -> None:
    stream = torch.empty(3, 4, 5, device="meta")  # a device that does not mix with the host's memory
    assert measure(stream, form, 3, stream.device).power.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_block_on_a_gpu_is_stored_as_it_was_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsiq.results.store.LARGE", 0)
    store, before = BlockStore(tmp_path / "blocks"), None
    store.open()
    for index, width in enumerate([2**20, 2**20, 2**19]):  # the copies' memory is taken again where it fits
        norm = torch.full((width,), float(index), device="cuda")
        before = store.write(index, BlockResult({}, {"norm.weight": norm}), before)
        norm.fill_(-1)
    for index, width in enumerate([2**20, 2**20, 2**19]):
        assert torch.equal(store.read(index).floats["norm.weight"], torch.full((width,), float(index)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_gpu_rounds_as_a_cpu_does(bits: int, symmetric: bool) -> None:
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    fmt = Integer(bits=bits, group=128, symmetric=symmetric)
    there = fmt.fit(*fmt.extremes(x.cuda()))
    here = fmt.fit(*fmt.extremes(x))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
    assert torch.equal(fmt.encode(x.cuda(), *there).cpu(), fmt.encode(x, *here))
    if bits >= 4:
        tokens = Activation(bits=bits, symmetric=symmetric)
        assert torch.equal(tokens.fake(x.cuda()).cpu(), tokens.fake(x))
