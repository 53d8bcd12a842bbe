"""lm-evaluation-harness on models that need not fit the device: its tasks, prompts and metrics, our forward pass."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from lsiq.errors import InputError
from lsiq.evals.generation import Prompt, check_room, hash_prompts, write_answers
from lsiq.evals.likelihood import Likelihoods, Pair, hash_pairs, measure_pairs
from lsiq.evals.tasks import Tasks, generates
from lsiq.evals.windows import Variant, by_model
from lsiq.models.loading import Model
from lsiq.results.record import Record
from lsiq.runtime import processes
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.files import replacing
from lsiq.runtime.signals import variable
from lsiq.runtime.terminal import show_progress, warn

if TYPE_CHECKING:
    from lsiq.evals.settings import EvalSettings


# The harness' name of a metric, and ours. Its perplexities are per word or byte of the untokenised text, or of the
# last word alone, and none is the perplexity per token of `ppl/`.
METRICS = {
    "perplexity": "last_word_ppl",
    "word_perplexity": "word_ppl",
    "byte_perplexity": "byte_ppl",
}
# Resamples for the standard error of metrics that have no formula for it.
_BOOTSTRAP = 1000


class Answers:
    """What models say to tasks.

    The likelihoods of every pair that is asked about are measured for all models when the first of them asks. What a
    model writes it writes when it is asked, with all its blocks on the device.
    """

    def __init__(self, model: Model, variants: Mapping[str, Variant], batch_tokens: int, cache: ContentCache) -> None:
        self._model, self._variants, self._batch_tokens, self._cache = model, variants, batch_tokens, cache
        self._likelihoods: dict[str, dict[str, Likelihoods]] = {}
        self._origins: dict[str, dict[str, Mapping[str, str]]] = {}

    def of(self, prefix: str, pairs: Sequence[Pair]) -> Likelihoods:
        """Return the likelihoods under one model."""
        key = hash_pairs(pairs)
        if key not in self._likelihoods:
            with contextlib.ExitStack() as stack:
                self._likelihoods[key], origins = measure_pairs(
                    self._model,
                    pairs,
                    self._variants,
                    self._batch_tokens,
                    self._cache,
                    partial(_next_stage, stack),
                )
            self._origins[key] = origins
        return self._likelihoods[key][prefix]

    def answers_to(self, prefix: str, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens that one model writes after each prompt."""
        with contextlib.ExitStack() as stack:
            answers, origin = write_answers(
                self._model,
                prompts,
                self._variants[prefix],
                self._batch_tokens,
                self._cache,
                partial(_next_stage, stack),
            )
        self._origins.setdefault(hash_prompts(prompts), {}).update({} if origin is None else {prefix: origin})
        return answers

    def origin(self, prefix: str) -> Mapping[str, str] | None:
        """Where a model's answers come from, if all of them were in the cache."""
        if all(prefix in origins for origins in self._origins.values()):
            return next(iter(self._origins.values()))[prefix]
        return None


def _next_stage(stack: contextlib.ExitStack, steps: int) -> Callable[[], None]:
    stack.close()  # one at a time is shown
    return stack.enter_context(show_progress("tasks", steps)).advance


def measure_tasks(
    tasks: Tasks,
    settings: EvalSettings,
    model: Model,
    variants: Mapping[str, Variant],
    cache: ContentCache,
    folder: Path,
    record: Record,
) -> None:
    """Measure every model on every task, and write metrics and standard errors into `record`.

    `folder/items.parquet` gets a row for each item of each task, with the metrics of each model.
    """
    answers = Answers(model, variants, settings.batch * settings.seqlen, cache)
    # All are asked the same, so long texts are cut for the one that has the fewest positions left.
    positions = min(
        (prepared.positions for prepared, _ in by_model(model, variants) if prepared.positions is not None),
        default=None,
    )
    rows: list[dict[str, Any]] = []
    for prefix in variants:
        results = _evaluate(model, positions, answers, prefix, tasks, settings.items)
        for name in tasks:
            samples = results["samples"][name]
            metrics = _metrics(results["results"][name], name)
            # The float setting measures one model, which is also the one under test.
            for label in (prefix, "") if "" not in variants else (prefix,):
                rows += _items(samples, name, label)
                record.metrics |= {f"{label}{key}": value for key, value in metrics.items()}
                if (origin := answers.origin(prefix)) is not None:
                    record.cached |= {f"{label}{key}": dict(origin) for key in metrics}
            protocol = {
                "task_version": results["versions"].get(name),
                "items": len({sample["doc_id"] for sample in samples}),
                "fewshot": 0,
                "requests": _hash_requests(samples),
                "lm_eval": importlib.metadata.version("lm_eval"),
            }
            record.protocol |= {key: protocol for key in metrics if not key.partition("/")[0].endswith("_stderr")}
    if processes.first():
        import pandas

        with replacing(folder / "items.parquet") as partial:
            pandas.DataFrame(rows).to_parquet(partial, index=False)


def check_tasks(model: Model, tasks: Tasks, items: int | None) -> None:
    """Look before anything long whether the model can generate the text that tasks ask for.

    A prefix that a method will find is not known here; where it takes the last positions, writing is refused later.

    Raises:
        ResourceError: the whole model has no room on the device.
        InputError: an answer is longer than the model's positions.
    """
    generating = {name: task for name, task in tasks.items() if generates(task)}
    if not generating:
        return
    check_room(model)
    if model.positions is None:
        return
    from lsiq.evals.harness_model import BlockLM, limit_of, no_place

    lm = BlockLM(model.tokenizer, model.positions, _unasked, _unasked)  # counts tokens alone
    for name, task in generating.items():
        limit = limit_of(task.config.generation_kwargs or {})
        if limit >= model.positions:
            raise InputError(no_place(limit, model.positions, name))
        with _quiet():
            task.build_all_requests(limit=items)
        contexts = [request.args[0] for request in task.instances]
        cut = sum(len(lm.tok_encode(context)) > model.positions - limit for context in contexts)
        if cut:
            warn(
                f"eval.tasks: {cut} of {len(contexts)} contexts of {name} lose their beginning, as {limit} of the "
                f"model's {model.positions} positions are kept for the answer"
            )


def _unasked(_: object) -> Never:
    raise AssertionError("no model is asked before the blocks are quantised")


def _hash_requests(samples: Sequence[Mapping[str, Any]]) -> str:
    """A hash of the prompts and answers of all items, and of which is right."""
    requests = [[sample["doc_id"], sample["arguments"], str(sample["target"])] for sample in samples]
    return hashlib.blake2b(json.dumps(requests, default=str).encode(), digest_size=8).hexdigest()


def _metrics(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """Return the numbers of one task by our keys: `acc/piqa`, `acc_stderr/piqa`, `exact_match_strict-match/gsm8k`."""
    metrics = {}
    for name, value in results.items():
        metric, _, extract = name.partition(",")
        stderr = metric.endswith("_stderr")
        metric = _key(metric.removesuffix("_stderr"), extract)
        if "," in name and isinstance(value, (int, float)) and value == value:
            metrics[f"{metric}{'_stderr' if stderr else ''}/{task}"] = float(value)
    return metrics


def _key(metric: str, extract: str) -> str:
    """Return our name of a metric; `extract` says how answers are read off generated text, where that is done."""
    return METRICS.get(metric, metric) + ("" if extract in ("", "none") else f"_{extract}")


def _items(samples: Sequence[Mapping[str, Any]], task: str, prefix: str) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{prefix}{_key(metric, sample.get('filter', ''))}/{task}",
            "item": sample["doc_id"],
            "value": float(sample[metric]),
        }
        for sample in samples
        for metric in sample["metrics"]
        if isinstance(sample[metric], (int, float))
    ]


def _evaluate(
    model: Model, positions: int | None, answers: Answers, prefix: str, tasks: Tasks, items: int | None
) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate

    from lsiq.evals.harness_model import BlockLM  # derives from a class of the harness

    lm = BlockLM(model.tokenizer, positions, partial(answers.of, prefix), partial(answers.answers_to, prefix))
    with _quiet():
        results = evaluate(lm, {"tasks": dict(tasks)}, limit=items, bootstrap_iters=_BOOTSTRAP)
    assert results is not None  # None is for the lower ranks of a distributed evaluation
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness' bars and remarks off the terminal, and its bootstrap in this process."""
    output = io.StringIO()
    with variable("DISABLE_MULTIPROC", "1"), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        yield
