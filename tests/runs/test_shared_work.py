"""What runs share is computed once, also by processes that want it at the same time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.configuration import CONF
from omegaconf import DictConfig

from lsiq.data.token_cache import TokenRequest, cached_tokens, token_cache
from lsiq.experiment.run import run
from lsiq.results.record import read_record

# Wants one entry of the cache argv[1], which takes argv[3] seconds to measure, and says so in the file argv[2].
WANT = """
import sys, time
from pathlib import Path
import torch
from lsiq.runtime.cache import ContentCache
cache = ContentCache(Path(sys.argv[1]), {}, {})
def measure():
    with open(sys.argv[2], "a") as file: file.write("measured\\n")
    time.sleep(float(sys.argv[3]))
    return {"found": torch.arange(5)}
print(cache.once(cache.key(), "the entry", measure)["found"].tolist())
"""


def processes(command: list[str], count: int) -> list[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    return [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=CONF.parent) for _ in range(count)]


@pytest.mark.slow
def test_one_process_measures_and_when_it_is_killed_another_one_does(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", WANT, str(tmp_path / "cache"), str(log)]
    (first,) = processes([*command, "60"], 1)  # not done before it is killed, however busy the machine is
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.02)
    others = processes([*command, "1"], 2)
    first.kill()
    first.communicate()
    assert [process.communicate(timeout=120)[0].strip() for process in others] == ["[0, 1, 2, 3, 4]"] * 2
    assert log.read_text() == "measured\n" * 2


@pytest.mark.slow
def test_two_runs_at_once_measure_their_references_once(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, str(CONF.parent / "run.py"), "method=gptq", f"model.path={checkpoints['llama']}"),
        *("calib=file", f"calib.path={text_file}", "calib.samples=4", "calib.seqlen=32", "quant.weight.group=32"),
        *("eval=file", f"eval.path={text_file}", "eval.seqlen=64", "tracker=none", f"paths.runs={tmp_path / 'runs'}"),
    ]
    started = [process for seed in range(2) for process in processes([*command, f"seed={seed}"], 1)]
    for process in started:
        _, story = process.communicate(timeout=120)
        assert process.returncode == 0, story
    records = [read_record(file.parent) for file in tmp_path.glob("runs/*/record.json")]
    cached = sorted((sorted(record.cached) for record in records if record is not None), key=len)
    assert cached == [[], ["float/ppl/file@64", "rtn/ppl/file@64"]]


def test_drawn_tokens_are_found_again_by_what_they_are_drawn_from(
    checkpoints: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    record = run(small_run(checkpoints["llama"]))
    cache = token_cache(str(tmp_path / "tokens"), record.versions, {})
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    text = tmp_path / "text.txt"

    def draw(**changes: object) -> torch.Tensor:
        values = {"corpus": "file", "split": "calibration", "path": str(text), "fields": ("text",), "seqlen": 32}
        return cached_tokens(TokenRequest(**{**values, "samples": 4, **changes}), tokenizer, cache)  # type: ignore[arg-type]

    def entries() -> int:
        return len(list((tmp_path / "tokens").glob("*.safetensors")))

    text.write_text("".join(f"In the {n}th year the harbour froze for {n % 9} weeks.\n" for n in range(90)))
    first = draw()
    assert torch.equal(draw(), first)
    assert first.dtype == torch.long
    assert entries() == 1
    assert torch.equal(draw(path=str(text.rename(tmp_path / "moved.txt"))), first)
    assert entries() == 1
    (tmp_path / "moved.txt").rename(text)
    assert not torch.equal(draw(seed=1), first)
    assert draw(samples=None).shape[1] == 32
    assert not torch.equal(draw(seqlen=16)[:, :16], first[:, :16])
    text.write_text(text.read_text().replace("harbour", "estuary"))
    assert not torch.equal(draw(), first)
    tokenizer.backend_tokenizer.add_tokens(["weeks"])
    draw()
    assert entries() == 6


def test_the_tokens_of_a_run_do_not_depend_on_the_cache(
    checkpoints: dict[str, Path], small_run: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = run(small_run(checkpoints["llama"], "method=gptq"))

    def not_again(*args: object) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr("lsiq.data.token_cache.read_corpus", not_again)
        kept = run(small_run(checkpoints["llama"], "method=gptq", "force=true"))
    alone = run(small_run(checkpoints["llama"], "method=gptq", "force=true", "paths.cache=null"))
    assert kept.calibration == alone.calibration == drawn.calibration
    assert kept.protocol == alone.protocol == drawn.protocol
    assert kept.metrics == alone.metrics == drawn.metrics
