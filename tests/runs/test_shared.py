"""On the real corpora, where they lie beside the checkout: the published protocol and the bundled models' cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.configuration import ROOT, SHARED, compose_run
from helpers.evaluations import FLAT_ROWS, by_item, plain_accuracy
from helpers.models import load_small

from lsiq.assets import bundled_model
from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.evals.perplexity import perplexity
from lsiq.evals.tasks import FLAT, read_rows
from lsiq.experiment.run import run

pytestmark = pytest.mark.shared
WIKI = SHARED / "data" / "wikitext2" / "wiki.test.raw"


def test_wikitext_rows_are_joined_as_published() -> None:
    text = read_corpus("wikitext2", "evaluation", str(WIKI)).joined()
    # The hub's data set has 4358 rows; blank ones are empty, others keep their newline.
    assert text.count("\n\n") >= 4357
    assert text.startswith("\n\n = Robert Boulter = \n\n\n")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_the_bundled_models_keep_their_perplexity_on_wikitext(name: str) -> None:
    model = load_small(bundled_model(name))
    windows = cut_windows(read_corpus("wikitext2", "evaluation", str(WIKI)), model.tokenizer, 512, "wikitext2")[:40]
    found = perplexity(model, windows, 8, lambda block: block.with_weights({}), lambda: None)
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())
    assert found.value == pytest.approx(golden[name]["wikitext2@512, 40 windows"], rel=1e-4)
    assert torch.isfinite(torch.tensor(found.value))


TASKS = SHARED / "data" / "tasks"
FILE_NAMES = {"openbookqa": "openbook_qa", "hellaswag": "hellaswag_val"}


def test_accuracy_equals_a_hand_written_scorer_on_200_items(tmp_path: Path) -> None:
    record = run(
        compose_run(
            "quant=fp16",
            "eval=zeroshot",
            "eval.tasks=[arc_easy]",
            f"eval.tasks_local.arc_easy={TASKS / 'arc_easy.jsonl'}",
            "eval.items=200",
            "calib=none",
            "tracker=none",
            f"paths.runs={tmp_path}",
        )
    )
    rows = [json.loads(line) for line in (TASKS / "arc_easy.jsonl").read_text().splitlines()[:200]]
    expected = plain_accuracy(bundled_model("tiny-llama"), rows, "{}\nAnswer:")
    for metric, right in expected.items():
        assert by_item(record, tmp_path, f"{metric}/arc_easy") == right


def test_the_tasks_of_both_papers_run_offline(tmp_path: Path) -> None:
    names = [*FLAT_ROWS]
    record = run(
        compose_run(
            "eval=none",
            f"eval.tasks=[{','.join(names)}]",
            *(f"+eval.tasks_local.{name}={TASKS / FILE_NAMES.get(name, name)}.jsonl" for name in names),
            "eval.items=20",
            "quant=fp16",
            "calib=none",
            "tracker=none",
            f"paths.runs={tmp_path}",
        )
    )
    for name in names:
        assert 0 <= record.metrics[f"acc/{name}"] <= 1
        assert record.metrics[f"acc_stderr/{name}"] >= 0
        assert record.protocol[f"acc/{name}"]["items"] == 20


def test_every_flat_row_is_understood() -> None:
    files = {name: TASKS / f"{FILE_NAMES.get(name, name)}.jsonl" for name in FLAT}
    missing = {name for name, file in files.items() if not file.exists()}
    assert missing <= {"gsm8k", "ifeval"}  # Their rows are not among the shared tasks.
    for name in FLAT.keys() - missing:
        _, fields, _ = FLAT[name]
        file = files[name]
        rows = read_rows(file, name)
        assert len(rows) >= 500
        assert not any(set(fields) <= set(row) for row in rows[:50])
