"""Tasks of lm-evaluation-harness: by name from the hub, or with items from a local file.

Prompts, answers and metrics are the harness' own definitions in both cases. A local file holds either rows in the
schema of the hub's data set, or the flat layout `query`, `choices`, `gold` that several public evaluations use; for the
tasks in `FLAT`, flat rows are turned back into the hub's schema. A flat file under any other name is a task of its
own: the choices are ranked after the query, or, in the layout `query`, `answer`, the line that the model writes after
the query is compared with the answer.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.assets import bundled_task
from lsiq.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lsiq.evals.settings import EvalSettings


Row = dict[str, Any]
Tasks = Mapping[str, Any]
_MEASURED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


def _arc(row: Row) -> Row:
    return {"question": row["query"].removeprefix("Question: "), **_lettered(row)}


def _lettered(row: Row) -> Row:
    labels = [chr(ord("A") + place) for place in range(len(row["choices"]))]
    return {"choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}


def _boolq(row: Row) -> Row:
    passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def _piqa(row: Row) -> Row:
    goal = row["query"].removeprefix("Question: ").rstrip("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    label, _, context = row["query"].partition(": ")
    # The harness capitalises the sentence to be finished; the flat rows hold it as it is, after the last full stop.
    ending = re.search(r"(?<=[.!?] )[a-z][^.!?]*$", context)
    start = context[: ending.start() - 1] if ending else context
    return {
        "activity_label": label,
        "ctx_a": start,
        "ctx_b": ending[0] if ending else "",
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    alike = (a == b for a, b in zip(first, second, strict=False))
    length = sum(1 for _ in itertools.takewhile(bool, alike))
    shared = first[: first.rfind(" ", 0, length) + 1]  # names may begin alike
    return {
        "sentence": f"{shared}_ {row['continuation']}",
        "option1": first[len(shared) :],
        "option2": second[len(shared) :],
        "answer": str(row["gold"] + 1),
    }


# By task: the folder of its definition in the harness, the fields of a flat row, and the hub's row made of it.
FLAT: dict[str, tuple[str, tuple[str, ...], Callable[[Row], Row]]] = {
    "arc_easy": ("arc", ("query", "choices", "gold"), _arc),
    "arc_challenge": ("arc", ("query", "choices", "gold"), _arc),
    "boolq": ("super_glue/boolq", ("query", "gold"), _boolq),
    "gsm8k": ("gsm8k", ("question", "answer"), dict),
    "hellaswag": ("hellaswag", ("query", "choices", "gold"), _hellaswag),
    "ifeval": ("ifeval", ("key", "prompt", "instruction_id_list", "kwargs"), dict),
    "lambada_openai": (
        "lambada",
        ("context", "continuation"),
        lambda row: {"text": f"{row['context']} {row['continuation']}"},
    ),
    "openbookqa": (
        "openbookqa",
        ("query", "choices", "gold"),
        lambda row: {"question_stem": row["query"], **_lettered(row)},
    ),
    "piqa": ("piqa", ("query", "choices", "gold"), _piqa),
    "winogrande": ("winogrande", ("context_options", "continuation", "gold"), _winogrande),
}
# What the harness scores these tasks with, beyond what it installs by itself.
_PACKAGES: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("ifeval", "leaderboard_ifeval"), ("langdetect", "immutabledict", "nltk")
)
# What definitions with local rows are grouped under, as rows go into the members of a group alone; lm-eval 0.5 puts it
# before the names.
_GROUP = "local"
_OWN = ("query", "choices", "gold")
_OWN_TEXT = ("query", "answer")


def load_tasks(settings: EvalSettings) -> Tasks:
    """Return the harness' task objects by name, their data at hand; empty where none is asked for.

    Raises:
        ConfigError: the harness or what it scores a task with is not installed, it knows no such task, or the task
            samples text.
        InputError: a file's rows do not fit, or data cannot be had.
    """
    if not settings.tasks:
        return {}
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(harness_missing(settings.tasks)) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(settings.tasks):
        path = settings.tasks_local.get(name) or bundled_task(name)
        tasks |= _load(name, None if path is None else read_rows(Path(path).expanduser(), name))
    for name, task in tasks.items():
        _check(name, task)
        task.set_config("num_fewshot", 0)
    return tasks


def harness_missing(tasks: Sequence[str]) -> str:
    return f"eval.tasks={list(tasks)}: lm-evaluation-harness is not installed; install lsiq[tasks]"


def no_such_task(name: str, near: Sequence[str]) -> str:
    """Return what is said of a name that the harness does not know, with those it knows that are `near`."""
    return (
        f"eval.tasks: {name} is no task of lm-evaluation-harness; "
        + (f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them.")
        + f" A file of your own items goes by eval.tasks_local.{name}=FILE"
    )


def check_packages(name: str) -> None:
    """Raise ConfigError where a package that the harness scores the task with is not installed."""
    if missing := [module for module in _PACKAGES.get(name, ()) if importlib.util.find_spec(module) is None]:
        raise ConfigError(_not_installed(name, missing))


def _not_installed(name: str, modules: Sequence[str]) -> str:
    pattern = re.compile(rf'(?:{"|".join(map(re.escape, modules))})\b.*extra == "([\w-]+)"')
    extras = [match[1] for line in importlib.metadata.requires("lm_eval") or [] if (match := pattern.match(line))]
    install = f"pip install 'lm_eval[{extras[0]}]'" if extras else "install it"
    return f"eval.tasks: {name} needs {' and '.join(modules)}, not installed here; {install}"


def fetch_punkt(name: str) -> None:
    """Fetch the data of nltk that the harness scores IFEval with, unless they are here.

    Raises:
        InputError: they cannot be had; the harness would find that out when it scores.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
            raise InputError(
                f"eval.tasks: {name} is scored with punkt_tab of nltk, which is not here and cannot be fetched; go "
                "online, or put it into a folder that NLTK_DATA names (python -m nltk.downloader -d FOLDER punkt_tab)"
            ) from None


def _check(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE not in _MEASURED:
        raise ConfigError(f"eval.tasks: {name} is of the kind {task.OUTPUT_TYPE}; there are {', '.join(_MEASURED)}")
    if not generates(task):
        return
    options = task.config.generation_kwargs or {}
    if options.get("do_sample") or (options.get("temperature") or 0) > 0 or options.get("num_beams", 1) > 1:
        raise ConfigError(f"eval.tasks: {name} asks for sampled text or beams; text is generated greedily here only")


def generates(task: Any) -> bool:
    """Whether a task asks for text rather than for likelihoods."""
    return task.OUTPUT_TYPE == "generate_until"


def read_rows(path: Path, name: str) -> list[Row]:
    """Return the rows of a jsonl file for the task `name`, flat ones in the hub's schema where it has one.

    Raises:
        InputError: names the line that is no JSON object or lacks a field.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"eval.tasks_local.{name}={path}: cannot be read ({error}); give a jsonl file") from error
    _, fields, convert = FLAT.get(name, ("", _OWN, dict))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if name in FLAT and convert is dict and (lacking := set(fields) - set(row)):
                raise ValueError(f"it lacks {' and '.join(sorted(lacking))}")
            rows.append(convert(row) if set(fields) <= set(row) else row)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise InputError(
                f"eval.tasks_local.{name}={path}, line {number}: not an item with {', '.join(fields)} ({error})"
            ) from error
    if not rows:
        raise InputError(f"eval.tasks_local.{name}={path}: holds no items; give a jsonl file with one item a line")
    return rows


def _load(name: str, rows: Sequence[Row] | None) -> dict[str, Any]:
    """Return the tasks that a name stands for; a group of the harness stands for several."""
    from lm_eval.tasks import TaskManager

    if rows is not None and name not in FLAT:
        for fields, definition in ((_OWN, _own_definition), (_OWN_TEXT, _own_text_definition)):
            if set(fields) <= set(rows[0]):
                return _build(TaskManager(include_defaults=False), {**definition(name), **_data(rows)}, name)
    if name in _PACKAGES:
        check_packages(name)
        fetch_punkt(name)
    manager = _manager(name)
    if name not in manager.all_tasks:
        raise ConfigError(no_such_task(name, difflib.get_close_matches(name, manager.all_tasks, n=3)))
    if rows is None:
        return _build(manager, name, name)
    return _build(manager, {"group": _GROUP, "task": [{"task": name, **_data(rows)}]}, name)


def _manager(name: str) -> Any:
    """Return an index of the harness' tasks that holds `name`; the whole one takes seconds to read."""
    import lm_eval.tasks

    if name in FLAT:
        folder = Path(lm_eval.tasks.__file__).parent / FLAT[name][0]
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        if name in manager.all_tasks:
            return manager
    return _whole_index()


@functools.cache
def _whole_index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _own_definition(name: str) -> Row:
    return {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }


def _own_text_definition(name: str) -> Row:
    return {
        "task": name,
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
        "filter_list": [
            {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ],
        "metadata": {"version": 1.0},
    }


def _data(rows: Sequence[Row]) -> Row:
    """The part of a task's definition that says where its items come from."""
    import datasets

    items = datasets.Dataset.from_list(list(rows))
    return {
        "custom_dataset": lambda **_: {"test": items},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None,
    }


def _build(manager: Any, spec: str | Row, name: str) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    local = f"give its items with eval.tasks_local.{name}=FILE"
    try:
        with _short_patience() if isinstance(spec, str) else contextlib.nullcontext():
            tasks = {key.removeprefix(f"{_GROUP}::"): task for key, task in manager.load([spec])["tasks"].items()}
            for task in tasks.values():
                _ = task.dataset  # lm-eval 0.5 reads it as late as here
            return tasks
    except Exception as error:  # the harness and datasets raise many kinds; all others mean that the task has no data
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            raise ConfigError(_not_installed(name, [error.name])) from error
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"eval.tasks: the data of {name} cannot be had ({cause}); go online, or {local}") from error


@contextlib.contextmanager
def _short_patience() -> Iterator[None]:
    """Where the hub does not answer, let datasets look into its cache only: its own retries take half a minute."""
    import datasets.config as datasets_config
    import huggingface_hub.constants as hub_constants

    from lsiq.data.hub import answers

    before = datasets_config.HF_HUB_OFFLINE, hub_constants.HF_HUB_OFFLINE
    if not any(before) and not answers():
        datasets_config.HF_HUB_OFFLINE = hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets_config.HF_HUB_OFFLINE, hub_constants.HF_HUB_OFFLINE = before
