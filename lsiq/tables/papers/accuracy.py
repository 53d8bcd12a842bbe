"""Tables of tasks and of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

from lsiq.tables.papers.layout import BUNDLED, METHODS, study_methods
from lsiq.tables.papers.perplexity import average_bits
from lsiq.tables.protocol import FINE_TUNING, PAPERS, PTB_TUNING, STUDY, ZERO_SHOT, Job
from lsiq.tables.published import Literature
from lsiq.tables.study import LQER_TASKS, Runs
from lsiq.tables.table import EQUAL_BITS, Cell, Row, Table, best_in_bold, percent

LQER_MODELS = ("opt-6.7b", "opt-13b", "opt-30b", "llama-7b", "llama-13b", "llama-30b", "llama-2-7b", "llama-2-13b")
LQER_MODELS += ("vicuna-7b", "vicuna-13b")
KINDS = ("stories", "science", "history", "craft")


def bundled_accuracy(runs: Runs, settings: Sequence[str]) -> Table:
    """Return the accuracies of the bundled models on the bundled task, in percent."""
    metric, rows = "acc/bundled_cloze", list[Row]()
    for setting in ("fp16", *settings):
        methods = ["fp16"] if setting == "fp16" else study_methods([setting])
        bits = {method: average_bits(runs, setting, method) for method in methods}
        values = [value for value in bits.values() if value is not None]
        for method in methods:
            cells = tuple(Cell(runs.sample(STUDY, m, setting, method, metric), wanted=True) for m in BUNDLED)
            spent = bits[method]
            rows.append(Row((setting, method), cells, setting, spent is None or spent <= EQUAL_BITS * min(values)))
    jobs = [
        (model, row.labels[0], row.labels[1])
        for row in rows
        for model, cell in zip(BUNDLED, row.cells, strict=True)
        if cell.sample is None and row.labels[1] != "fp16"
    ]
    return Table(
        "zero-shot-bundled",
        "Accuracy on the bundled task (120 items of four answers, chance 25 %), percent",
        ("setting", "method", *BUNDLED),
        best_in_bold(rows, lower=False),
        number=percent,
        commands=STUDY.commands(jobs),
    )


def hub_accuracy(runs: Runs, literature: Literature, settings: Sequence[str]) -> Table:
    """Return the means over LQER's six tasks, ours beside the published, in percent."""
    rows = []
    for setting, method in [("fp16", "fp16"), *((s, m) for s in settings for m in METHODS[1:])]:
        cells = tuple(
            Cell(
                runs.sample(ZERO_SHOT, model, setting, method, "acc/mean6"),
                literature.accuracy(model, setting, method, "mean6"),
                wanted=True,
            )
            for model in LQER_MODELS
        )
        if any(cell.sample or cell.published for cell in cells):
            rows.append(Row((setting, method), cells, setting))
    jobs = [
        (model, row.labels[0], row.labels[1])
        for row in rows
        for model, cell in zip(LQER_MODELS, row.cells, strict=True)
        if cell.sample is None and row.labels[1] != "fp16"
    ]
    caption = "Mean accuracy over LQER's six tasks, percent: ours / published"
    return _hub_table("zero-shot-lqer", caption, rows, LQER_MODELS, jobs)


def hub_tasks(runs: Runs, literature: Literature, model: str, jobs: Sequence[tuple[str, str]]) -> Table:
    """Return one model's accuracies by task, ours beside the published, in percent."""
    columns = (*LQER_TASKS, "mean6")
    rows = [
        Row(
            (setting, method),
            tuple(
                Cell(
                    runs.sample(ZERO_SHOT, model, setting, method, f"acc/{task}"),
                    literature.accuracy(model, setting, method, task),
                    wanted=True,
                )
                for task in columns
            ),
            setting,
        )
        for setting, method in jobs
    ]
    empty = [row.labels for row in rows if row.labels[1] != "fp16" and any(cell.sample is None for cell in row.cells)]
    missing = [(model, setting, method) for setting, method in empty]
    caption = f"{model}, accuracy by task, percent: ours / published"
    return _hub_table(f"zero-shot-{model}", caption, rows, columns, missing)


def fine_tuning(runs: Runs) -> Table:
    """Return perplexities by kind of text before and after increments in the last blocks learned on stories."""
    rows, jobs = list[Row](), []
    for model in BUNDLED:
        before, after = [], []
        for kind in KINDS:
            metric = f"ppl/{kind}@512"
            before.append(Cell(runs.sample(FINE_TUNING, model, "w3a16g128", "rtn", metric), wanted=True))
            after.append(Cell(runs.sample(FINE_TUNING, model, "w3a16g128", "lsi-finetune", metric), wanted=True))
        pair = best_in_bold(
            [Row((model, "rtn"), tuple(before), model), Row((model, "rtn, tuned on stories"), tuple(after), model)]
        )
        rows += pair
        if any(cell.sample is None for row in pair for cell in row.cells):
            jobs.append(model)
    return Table(
        "fine-tuning-bundled",
        "Perplexity by kind of text at w3a16g128: before and after fine-tuning on stories",
        ("model", "", *KINDS),
        tuple(rows),
        commands=[f"{FINE_TUNING.command} model={','.join(jobs)}"] if jobs else (),
    )


def hub_fine_tuning(runs: Runs, literature: Literature) -> Table:
    """Return the published fine-tuning results on PTB, with room for ours."""
    jobs = (("llama-7b", "w3a16g128"), ("llama-30b", "w4a16"))
    rows = [
        Row(
            (f"{model} {setting}", method),
            (
                Cell(
                    runs.sample(protocol, model, setting, method, "ppl/ptb@2048"),
                    literature.perplexity(model, setting, method, "ptb"),
                    wanted=True,
                ),
            ),
            model,
        )
        for model, setting in jobs
        for protocol, method in ((PAPERS, "omniquant"), (PTB_TUNING, "lsi-finetune"))
    ]
    commands = [
        f"python run.py -m model={model} quant={setting} method=omniquant calib=wikitext2 eval=ptb seed=0,1,2 && "
        f"python run.py model={model} quant={setting} method=lsi-finetune method.run=<its run id> calib=ptb eval=ptb"
        for model, setting in jobs
    ]
    caption = "Perplexity on PTB before and after fine-tuning on it (LSI): ours / published"
    heads = ("model", "method", "PTB")
    return Table("fine-tuning-papers", caption, heads, best_in_bold(rows), beside=True, commands=commands)


def _hub_table(name: str, caption: str, rows: Sequence[Row], columns: Sequence[str], jobs: Sequence[Job]) -> Table:
    heads, commands = ("setting", "method", *columns), ZERO_SHOT.commands(jobs)
    return Table(name, caption, heads, best_in_bold(rows, lower=False), True, percent, commands, folded=True)
