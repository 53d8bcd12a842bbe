"""Zero-shot tasks: the harness' prompts and metrics, offline, item by item what a scorer of a few lines says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.configuration import compose_run
from helpers.evaluations import FLAT_ROWS, by_item, plain_accuracy, plain_likelihoods
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsiq.assets import bundled_model, bundled_task
from lsiq.bundle.cloze import items
from lsiq.errors import ConfigError, InputError
from lsiq.evals.settings import EvalSettings
from lsiq.evals.tasks import load_tasks, read_rows
from lsiq.experiment.run import run

SmallRun = Callable[..., DictConfig]


def settings(*overrides: str) -> EvalSettings:
    from lsiq.experiment.config import parse

    return parse(compose_run(*overrides)).eval


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", sorted(FLAT_ROWS))
def test_flat_rows_give_the_prompts_of_the_harness(name: str, tmp_path: Path) -> None:
    row, prompt, answers = FLAT_ROWS[name]
    file = write_rows(tmp_path / "rows.jsonl", row, row)
    (task,) = load_tasks(settings("eval=none", f"eval.tasks=[{name}]", f"+eval.tasks_local.{name}={file}")).values()
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0] == prompt
    assert [request.args[1] for request in task.instances] == answers
    if name not in ("winogrande", "lambada_openai"):
        assert task.doc_to_target(next(iter(task.test_docs()))) in (row["gold"], str(row["gold"]))
    assert task.VERSION >= 1.0


def test_rows_in_the_schema_of_the_hub_are_left_as_they_are(tmp_path: Path) -> None:
    hub = {"question": "What melts ice?", "choices": {"text": ["heat", "cold"], "label": ["A", "B"]}, "answerKey": "A"}
    file = write_rows(tmp_path / "rows.jsonl", hub)
    assert read_rows(file, "arc_easy") == [hub]


def test_the_bundled_task_is_what_its_script_writes() -> None:
    path = bundled_task("bundled_cloze")
    assert path is not None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == items()
    assert len(rows) == 120
    assert all(len(set(row["choices"])) == 4 for row in rows)


@pytest.mark.slow
def test_the_bundled_task_equals_a_hand_written_scorer_item_by_item(tmp_path: Path) -> None:
    record = run(
        compose_run(
            "eval=zeroshot-bundled",
            "eval.items=10",
            "quant=fp16",
            "calib=none",
            "tracker=none",
            f"paths.runs={tmp_path}",
        )
    )
    path = bundled_task("bundled_cloze")
    assert path is not None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:10]
    expected = plain_accuracy(bundled_model("tiny-llama"), rows, "{}")
    for metric, right in expected.items():
        assert by_item(record, tmp_path, f"{metric}/bundled_cloze") == right
        assert record.metrics[f"{metric}/bundled_cloze"] == sum(right) / len(right)
        assert record.metrics[f"{metric}_stderr/bundled_cloze"] > 0
    assert record.protocol["acc/bundled_cloze"]["task_version"] == 1.0
    assert record.protocol["acc/bundled_cloze"]["items"] == 10


def test_all_models_share_one_measurement_and_references_are_cached(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    overrides = ("method=gptq", "eval=zeroshot-bundled", "eval.path=null", "eval.items=6")
    first = run(small_run(checkpoints["llama"], *overrides))
    second = run(small_run(checkpoints["llama"], "seed=1", *overrides))
    assert first.cached == {}
    assert {key.partition("/")[0] for key in second.cached} == {"float", "rtn"}
    for key in second.cached:
        assert second.metrics[key] == first.metrics[key]
    assert by_item(second, tmp_path / "runs", "rtn/acc/bundled_cloze") == by_item(
        first, tmp_path / "runs", "rtn/acc/bundled_cloze"
    )


def test_likelihoods_equal_the_plain_forward_whatever_is_batched(checkpoint: Path) -> None:
    from helpers.evaluations import NO_CACHE, unchanged
    from helpers.models import load_small

    from lsiq.evals.likelihood import measure_pairs
    from lsiq.evals.windows import Variant

    texts = [
        ("The boat", " carried salt"),
        ("The boat", " sank"),
        ("A harbour with a long wall", " holds the sea back"),
    ]
    model = load_small(checkpoint)
    split = [
        (c, w[len(c) :]) for a, b in texts if (c := model.tokenizer.encode(a)) and (w := model.tokenizer.encode(a + b))
    ]
    for batch_tokens in (1, 12, 1000):
        found, _ = measure_pairs(model, split, {"": Variant(unchanged)}, batch_tokens, NO_CACHE, lambda _: lambda: None)
        expected = plain_likelihoods(checkpoint, texts)
        assert found[""].log_likelihood.tolist() == pytest.approx([value for value, _ in expected], rel=1e-5)
        assert found[""].greedy.tolist() == [greedy for _, greedy in expected]


@pytest.mark.slow
def test_word_perplexity_has_a_key_of_its_own(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    page = " ".join(f"The {n} boats lay at anchor ." for n in range(40))
    file = write_rows(tmp_path / "pages.jsonl", {"page": page})
    record = run(
        small_run(
            checkpoints["llama"],
            "eval=none",
            "eval.path=null",
            "eval.tasks=[wikitext]",
            f"+eval.tasks_local.wikitext={file}",
        )
    )
    assert record.metrics["float/word_ppl/wikitext"] > record.metrics["float/byte_ppl/wikitext"] > 1
    assert not any(key.startswith(("ppl/", "float/ppl/")) for key in record.metrics)


@pytest.mark.slow
def test_a_name_nobody_knows_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean arc_easy"):
        load_tasks(settings("eval=none", "eval.tasks=[arc_eazy]"))


def test_a_damaged_file_of_items_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"query": "Question: x", "choices": ["a", "b"], "gold": 0}\n{"query": "x", "choices": 3, "gold": 9}\n'
    )
    with pytest.raises(InputError, match="line 2"):
        read_rows(file, "arc_easy")


def test_hub_tasks_without_the_hub_say_how_to_go_on() -> None:
    with pytest.raises(InputError, match=r"eval\.tasks_local\.arc_easy=FILE"):
        load_tasks(settings("eval=zeroshot"))


def test_the_harness_own_model_class_gives_the_same_likelihoods(checkpoint: Path) -> None:
    pytest.importorskip("accelerate")  # the harness' class for transformers models wants it, this package does not
    from helpers.evaluations import NO_CACHE, request, unchanged
    from helpers.models import load_small
    from lm_eval.models.huggingface import HFLM

    from lsiq.evals.generation import Writer
    from lsiq.evals.harness_model import BlockLM
    from lsiq.evals.likelihood import measure_pairs
    from lsiq.evals.windows import Variant

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    harness = HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=2, device="cpu")
    model = load_small(checkpoint)
    ours = BlockLM(
        model.tokenizer,
        model.config.max_position_embeddings,
        lambda pairs: measure_pairs(model, pairs, {"": Variant(unchanged)}, 64, NO_CACHE, lambda _: lambda: None)[0][
            ""
        ],
        Writer(model, unchanged).write,
    )
    long = "The boat went to the harbour. " * 40  # more than the model's 128 positions
    asked = [("", "The boat"), ("A trailing blank ", "moves"), (long, " again"), ("The boat", " sank slowly")]
    ranked = [request("loglikelihood", *pair) for pair in asked]
    expected, found = (lm.loglikelihood(ranked, disable_tqdm=True) for lm in (harness, ours))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], rel=1e-5
    )  # measured: 1.2e-7
    rolled = [request("loglikelihood_rolling", text) for text in (long, "Short.")]
    expected, found = (np.array(lm.loglikelihood_rolling(rolled, disable_tqdm=True)) for lm in (harness, ours))
    assert found == pytest.approx(expected, rel=1e-5)
    settings = {"until": [" the", "\n"], "max_gen_toks": 12, "do_sample": False}
    written = [request("generate_until", text, settings) for text in ("The boat", "A harbour with a wall", long)]
    assert ours.generate_until(written) == harness.generate_until(written, disable_tqdm=True)
