"""Evaluation in one pass: same numbers as one model and one corpus at a time, remembered, compared token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from helpers.evaluations import NO_CACHE, halved, unchanged
from helpers.marks import slow
from helpers.models import load_small
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from lsiq.evals.block_pass import prefetched, run_blocks
from lsiq.evals.perplexity import perplexity
from lsiq.evals.windows import FLOAT, Variant, measure_windows
from lsiq.experiment.run import run
from lsiq.runtime.cache import ContentCache

SmallRun = Callable[..., DictConfig]


def tokens(windows: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4096, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


def test_one_pass_gives_each_model_and_corpus_the_number_it_has_alone(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    windows = {"a": tokens(5, 32), "b": tokens(3, 32, seed=1)}
    variants = {FLOAT: Variant(unchanged, "float"), "": Variant(halved)}
    steps: list[None] = []
    found = measure_windows(model, windows, variants, 2, True, NO_CACHE, lambda: steps.append(None))
    assert len(steps) == model.depth  # one pass, not one for each corpus and model
    for corpus, ids in windows.items():
        for prefix, function_of in {FLOAT: unchanged, "": halved}.items():
            alone = perplexity(model, ids, 2, function_of, lambda: None)
            together = found[corpus][prefix].scores.perplexity()
            assert together.value == pytest.approx(alone.value, rel=1e-6)  # measured: 0.0
            assert (together.tokens, together.windows) == (alone.tokens, alone.windows)


def test_batches_of_different_lengths_pass_together(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    batches = [tokens(2, 16), tokens(1, 40, seed=1)]
    left = run_blocks(model, {"": batches}, {"": unchanged}, lambda: None)[""]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for ids, hidden in zip(batches, left, strict=True):
        with torch.no_grad():
            expected = plain(ids, use_cache=False).logits
        assert torch.allclose(model.logits(hidden), expected, atol=1e-5, rtol=1e-5)  # measured: 0.0


def test_the_next_block_is_prepared_while_this_one_runs_and_no_further() -> None:
    prepared: list[int] = []

    def prepare(index: int) -> int:
        prepared.append(index)
        return index

    cpu = torch.device("cpu")
    for index, block in enumerate(prefetched(prepare, 4, cpu)):
        assert block == index
        assert prepared[: index + 1] == list(range(index + 1))
        assert len(prepared) <= index + 2
    assert prepared == [0, 1, 2, 3]


def test_an_error_in_a_block_read_ahead_reaches_the_user() -> None:
    def prepare(index: int) -> int:
        if index == 2:
            raise ValueError("block 2 is damaged")
        return index

    blocks = prefetched(prepare, 4, torch.device("cpu"))
    assert [next(blocks), next(blocks)] == [0, 1]
    with pytest.raises(ValueError, match="block 2 is damaged"):
        next(blocks)


def test_divergence_is_that_of_the_two_plain_predictions(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    ids = tokens(3, 24)
    variants = {FLOAT: Variant(unchanged, "float"), "": Variant(halved)}
    found = measure_windows(model, {"x": ids}, variants, 2, True, NO_CACHE, lambda: None)["x"]
    left = {
        name: run_blocks(model, {"": [ids]}, {"": f}, lambda: None)[""][0]
        for name, f in {"float": unchanged, "other": halved}.items()
    }
    p, q = (model.logits(left[name][:, :-1]).double().softmax(-1) for name in ("float", "other"))
    expected = (p * (p / q).log()).sum(-1)
    scores = found[""].scores
    assert scores.divergence is not None
    assert scores.agrees is not None
    assert torch.allclose(scores.divergence.double(), expected, rtol=1e-4, atol=1e-5)  # measured: 8e-6 relative
    assert torch.equal(scores.agrees, p.argmax(-1) == q.argmax(-1))
    assert found[FLOAT].scores.divergence is None


def test_a_model_does_not_diverge_from_itself(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    variants = {FLOAT: Variant(unchanged, "float"), "": Variant(unchanged)}
    found = measure_windows(model, {"x": tokens(2, 24)}, variants, 2, True, NO_CACHE, lambda: None)["x"]
    scores = found[""].scores
    assert scores.divergence is not None
    assert scores.agrees is not None
    assert scores.divergence.abs().max() < 1e-6  # measured: 0.0
    assert scores.agrees.all()
    assert torch.equal(scores.losses, found[FLOAT].scores.losses)


def test_references_are_measured_once_and_the_record_says_so(checkpoint: Path, small_run: SmallRun) -> None:
    first = run(small_run(checkpoint, "method=gptq"))
    second = run(small_run(checkpoint, "method=gptq", "seed=1"))
    assert first.cached == {}
    assert set(second.cached) == {"float/ppl/file@64", "rtn/ppl/file@64"}
    assert second.cached["float/ppl/file@64"] == {"run": first.run_id, "created": first.created}
    references = [key for key in first.metrics if key.startswith(("float/", "rtn/"))]
    assert len(references) > 10
    assert [second.metrics[key] for key in references] == [first.metrics[key] for key in references]
    again = run(small_run(checkpoint, "method=gptq", "seed=1", "force=true", "paths.cache=null"))
    assert again.cached == {}
    assert again.metrics == second.metrics  # what was taken from the cache is what would have been measured


@pytest.mark.parametrize(
    "change",
    ["eval.seqlen=32", "quant.weight.bits=4", *map(slow, ["eval.windows=3", "eval.batch=4", "model.dtype=bfloat16"])],
)
def test_what_decides_a_number_decides_whether_it_is_found(
    checkpoints: dict[str, Path], small_run: SmallRun, change: str
) -> None:
    run(small_run(checkpoints["llama"], "method=gptq"))
    other = run(small_run(checkpoints["llama"], "method=gptq", change))
    # Another format has another round-to-nearest, and the same float model.
    kept = {"float/ppl/file@64"} if change.startswith("quant") else set()
    assert set(other.cached) == kept


def test_a_damaged_entry_is_measured_again(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(small_run(checkpoint))
    entries = sorted((tmp_path / "runs" / "cache").glob("*.safetensors"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-9])
    again = run(small_run(checkpoint, "force=true"))
    assert again.cached == {}
    assert again.metrics == first.metrics
    assert "it is measured again" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_costs_a_warning_not_the_run(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    record = run(small_run(checkpoints["llama"], f"paths.cache={tmp_path / 'taken'}"))
    assert record.status == "finished"
    assert capsys.readouterr().err.count("cannot be written") == 2  # once of tokens, once of scores


def test_runs_may_share_a_cache_at_the_same_time(tmp_path: Path) -> None:
    def write(value: float) -> None:
        cache = ContentCache(tmp_path, {"model": "x"}, {"run": "r"})
        for _ in range(30):
            cache.write(cache.key(corpus="c"), {"losses": torch.full((2000,), value)})

    seen = 0
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, float(value)) for value in range(2)]
        cache = ContentCache(tmp_path, {"model": "x"}, {})
        while not all(writer.done() for writer in writers):
            if (entry := cache.read(cache.key(corpus="c"))) is not None:
                assert len(entry.tensors["losses"].unique()) == 1  # never half of one and half of another
                seen += 1
    assert [writer.result() for writer in writers] == [None, None]
    assert seen > 0
    assert len(list(tmp_path.iterdir())) == 1  # no partial file is left


def test_window_losses_are_stored_and_give_the_perplexity(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    record = run(small_run(checkpoint, "method=gptq"))
    rows = pandas.read_parquet(tmp_path / "runs" / record.run_id / "windows.parquet")
    assert list(rows["window"]) == list(range(record.protocol["ppl/file@64"]["windows"]))
    for column, prefix in {"loss": "", "float_loss": "float/", "rtn_loss": "rtn/"}.items():
        assert np.exp(rows[column].mean()) == pytest.approx(record.metrics[f"{prefix}ppl/file@64"], rel=1e-9)
    assert rows["kl"].mean() == pytest.approx(record.metrics["kl/file@64"], rel=1e-9)


def test_without_divergence_the_cached_float_model_does_not_run(checkpoint: Path, small_run: SmallRun) -> None:
    first = run(small_run(checkpoint, "eval.divergence=false"))
    second = run(small_run(checkpoint, "eval.divergence=false", "seed=1"))
    assert not any("kl/" in key for key in first.metrics)
    assert set(second.cached) == {"float/ppl/file@64"}
    with_divergence = run(small_run(checkpoint))
    assert with_divergence.metrics["ppl/file@64"] == pytest.approx(first.metrics["ppl/file@64"], rel=1e-6)
    assert json.dumps(with_divergence.metrics)  # plain numbers
