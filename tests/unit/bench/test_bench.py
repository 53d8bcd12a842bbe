"""The benchmarks run on any machine, small."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.marks import slow

from lsiq.bench import best, block, processes, step
from lsiq.bench.timing import FlopsByDtype


@pytest.mark.parametrize("method", ["gptq", slow("qera-exact")])
def test_a_small_block_is_timed_by_stage_beside_its_floor(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--hidden", "128", "--intermediate", "256", "--heads", "2", "--samples", "4", "--seqlen", "16"]
    monkeypatch.setattr(sys, "argv", ["block", "--method", method, "--batch", "2", "--rank", "8", *shape])
    block.main()
    told = capsys.readouterr().out
    assert all(word in told for word in (f"{method}: ", "statistics", "peak of the host", "TFLOP/s"))


def test_the_small_command_that_the_module_names_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in str(block.__doc__).splitlines() if "--hidden" in line]
    monkeypatch.setattr(sys, "argv", [*command.removeprefix("python -m lsiq.bench.").split(), "--device", "cpu"])
    block.main()
    assert "gptq: " in capsys.readouterr().out


def test_gptq_is_timed_with_both_kernels_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--hidden", "64", "--intermediate", "128", "--heads", "2", "--samples", "2", "--seqlen", "16"]
    monkeypatch.setattr(
        sys, "argv", ["block", "--method", "gptq", "--kernels", "auto", "plain", "--group", "32", *shape]
    )
    block.main()
    told = capsys.readouterr().out
    assert told.count("gptq: ") == 2
    assert "kernels=plain; output_error 0." in told
    assert "codes that are those of the first: 1.000000" in told or torch.cuda.is_available()
    monkeypatch.setattr(sys, "argv", ["block", "--method", "awq", "--kernels", "plain"])
    with pytest.raises(SystemExit):
        block.main()
    assert "--kernels plain: only gptq has a choice" in capsys.readouterr().err


@pytest.mark.product
def test_one_block_is_timed_under_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--hidden", "128", "--intermediate", "256", "--heads", "2", "--samples", "4", "--seqlen", "16"]
    monkeypatch.setattr(sys, "argv", ["processes", *shape, "--batch", "2", "--device", "cpu", "method=gptq"])
    processes.main()
    told = capsys.readouterr().out
    assert all(word in told for word in ("method=gptq", "1 processes: block", "2 processes: block", "peak host"))


def test_a_step_is_timed_by_part_and_its_kernels_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--seqlen", "16", "--steps", "1", "--device", "cpu", "--precision", "float32"]
    monkeypatch.setattr(sys, "argv", ["step", "--small", "--only", "qwen-3-lsi-4", "--profile", *size])
    step.main()
    told = capsys.readouterr().out
    assert told.index("matrix products: ") < told.index("| qwen-3-lsi-4 | ") < told.index("aten::mm")


@pytest.mark.product
def test_a_whole_model_is_quantised_and_its_time_projected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--seqlen", "16", "--layers", "2", "--samples", "4", "--device", "cpu", "--kernels", "plain"]
    monkeypatch.setattr(sys, "argv", ["step", "--small", "--whole", "1", *size])
    step.main()
    told = capsys.readouterr().out
    assert all(word in told for word in ("block 1: ", "plain", "projected for 20 epochs", "peak"))


@pytest.mark.product
def test_the_best_recipe_runs_in_part_and_the_rest_is_projected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--layers", "3", "--blocks", "2", "--samples", "8", "--seqlen", "16", "--device", "cpu"]
    form = ["--form", "window", "--window", "2", "--end-share", "0.2"]
    short = "method.weight_only.start.training.epochs=1"
    monkeypatch.setattr(sys, "argv", ["best", "--small", *size, *form, short])
    best.main()
    told = capsys.readouterr().out
    assert "matrix products: " in told, "the ceiling of the same run"
    assert told.count("s: an epoch ended, loss ") == 4, "two windows of two epochs each"
    assert all(
        word in told for word in ("block 1: ", "window of 2 blocks", "2 of 10 epochs", "s a step", "projected: ")
    )


@pytest.mark.parametrize("key_heads", [8, 2])
def test_attention_counts_the_same_products_where_queries_share_keys(key_heads: int) -> None:
    queries = torch.empty(3, 8, 16, 64, dtype=torch.float16, device="meta")
    keys = torch.empty(3, key_heads, 32, 64, dtype=torch.float16, device="meta")
    with FlopsByDtype() as counted:
        torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, keys)
    assert counted.counts == {"float16": 2 * (2 * 3 * 8 * 16 * 32 * 64)}
