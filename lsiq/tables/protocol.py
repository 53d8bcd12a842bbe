"""Which runs may stand in a table, and the commands that carry out those that are missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lsiq.experiment.composed import listed_parts, method_in_epochs, recipe_for
from lsiq.report.compact import Run, part_name, without_nulls
from lsiq.runtime.hydra_entry import version_base

ROOT = Path(__file__).resolve().parent.parent.parent
# What changes how a number is computed, and moves it less than a seed does: none of it makes another method. Neither
# does the name of the run that another one starts from.
_SAME = ("calib.batch", "precision", "product", "graphs", "run")
# But for the precision of training through a whole model, which at 4 bits decides between a good and a bad result.
_THROUGH_THE_MODEL = "lsiq.methods.learned.Course"
# A run of one model, setting and method.
Job = tuple[str, str, str]


@dataclass(frozen=True)
class Protocol:
    """The settings that the runs of a table share: those of a study.

    A run belongs if nothing it says contradicts what the method's file and the study compose to today. Settings that
    only one of the two knows are no contradiction: later versions may add some.

    Attributes:
        overrides: compose the study.
        command: carries out a job for all seeds, before model, quant and method.
        after: what the command says last.
        varied: dotted names of settings that are free to differ, as in an ablation.
        stated: dotted names of settings that a run must know to belong.
        recipe: composes the method, where its name in records is that of no file.
    """

    overrides: tuple[str, ...]
    command: str
    after: str = ""
    varied: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()

    def holds(self, run: Run) -> bool:
        """Whether the run belongs."""
        return self.contradiction(run) is None

    def contradiction(self, run: Run) -> str | None:
        """Return what keeps the run out, the dotted name of a setting; None if it belongs."""
        expected = composed((*self.overrides, *(self.recipe or method_overrides(run.method))))
        if expected is None:
            return "method"
        if not self.same_float(run):
            return "model"
        if (unknown := next((key for key in self.stated if run.get(key) is None), None)) is not None:
            return unknown
        stated = {"calib": expected["calib"], "method": recipe_for(expected["method"], run.config.get("quant"))}
        return contradiction(run.config, stated, "", self.varied)

    def same_float(self, run: Run) -> bool:
        """Whether the run measured the same float model on as much text: of the same type, and as it was trained."""
        expected = composed(self.overrides)
        assert expected is not None  # the study's own file
        if run.get("eval.windows") != expected["eval"].get("windows"):
            return False
        dtype = "tf32" if expected["eval"].get("tf32") else expected["model"]["dtype"]
        return dtype in ("auto", run.dtype) and not run.get("model.outliers")

    def commands(self, jobs: Iterable[Job]) -> list[str]:
        """Return commands that carry out just these jobs, as few as products of lists allow."""
        by_model: dict[tuple[str, str], set[str]] = defaultdict(set)
        order: dict[str, int] = {}  # models stand as they came, the same in every command
        for model, setting, method in jobs:
            by_model[setting, method].add(model)
            order.setdefault(model, len(order))
        by_method: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
        for (setting, method), models in by_model.items():
            # A method with a `then` is several overrides, which no list can hold.
            alone = method if "+" in method else ""
            by_method[f"{setting}/{alone}", tuple(sorted(models, key=order.__getitem__))].append(method)
        by_setting: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
        for (setting, models), methods in by_method.items():
            by_setting[tuple(methods), models].append(setting.partition("/")[0])
        return [
            " ".join(
                word
                for word in (
                    self.command,
                    f"model={','.join(models)}",
                    f"quant={','.join(settings)}",
                    *(method_overrides(methods[0]) if len(methods) == 1 else [f"method={','.join(methods)}"]),
                    self.after,
                )
                if word
            )
            for (methods, models), settings in by_setting.items()
        ]


# The bundled models. What was evaluated is not compared: the metric's key says it.
STUDY = Protocol(("sweep=study",), "python run.py sweep=study")
# The same with three times as many sequences beside, which the float model writes itself: rows of their own.
AUGMENTED = Protocol(
    ("sweep=study", "calib=augmented"), "python run.py sweep=study calib=augmented", stated=("calib.written",)
)
# Hub models as the papers measure them.
PAPERS = Protocol(("experiment=paper-protocol",), "python run.py -m experiment=paper-protocol", "seed=0,1,2")
ZERO_SHOT = Protocol(PAPERS.overrides, f"{PAPERS.command} eval=zeroshot", PAPERS.after)
PTB_TUNING = Protocol(("calib=ptb", "eval=ptb"), "")
FINE_TUNING = Protocol(("sweep=finetune",), "python run.py sweep=finetune")


def method_overrides(name: str) -> list[str]:
    """Return what the command line says for a method's name in records; `awq+gptq` is awq with gptq in its `then`."""
    first, *links = name.split("+")
    return [f"method={first}", *(f"method@method{'.then' * depth}={link}" for depth, link in enumerate(links, 1))]


@cache
def composed(overrides: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return the composed configuration as plain data; None where a method is not made of files."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException, MissingConfigException
    from omegaconf import OmegaConf

    try:
        with initialize_config_dir(str(ROOT / "conf"), **version_base()):
            config = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    except (ConfigCompositionException, MissingConfigException):
        return None
    assert isinstance(config, dict)
    return without_nulls(listed_parts({**config, "method": method_in_epochs(config)}))


def _same_precision(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a training through the model ran in the precision that is asked for; auto asks for none.

    In a record whose auto was left as it is, it meant the model's own. TF32 counts as float32: on SmolLM2 at 2, 3 and 4
    bits (docs/scale-study.md) the two differ by less than two seeds, now this way, now that.
    """
    actual_precision, expected_precision = actual.get("precision"), expected.get("precision")
    if actual_precision is None or expected_precision in (None, "auto"):
        return True
    same = {"auto": "model", "tf32": "float32"}
    return same.get(expected_precision, expected_precision) == same.get(actual_precision, actual_precision)


def _known(actual: list[Any], expected: list[Any]) -> list[Any]:
    """Return the expected parts without those that act in some models alone, where the record is older than they are.

    Records of models in which such a part does act have later runs, and the later run of a seed counts.
    """
    recorded = {item.get("_target_") for item in actual if isinstance(item, Mapping)}
    return [
        item
        for item in expected
        if not (isinstance(item, Mapping) and item.get("only_with_shifts") and item.get("_target_") not in recorded)
    ]


def _by_position(varied: tuple[str, ...], key: str, items: list[Any]) -> tuple[str, ...]:
    """Return the free settings with those of parts that are called by name called by position as well."""
    positions = {
        f"{key}.{part_name(item)}.": f"{key}.{index}." for index, item in enumerate(items) if isinstance(item, Mapping)
    }
    called = [
        position + setting.removeprefix(name)
        for setting in varied
        for name, position in positions.items()
        if setting.startswith(name)
    ]
    return (*varied, *called)


def contradiction(actual: Any, expected: Any, key: str = "", varied: tuple[str, ...] = ()) -> str | None:
    """The first setting below `key` that makes another method of it, or None."""
    free = key in varied or key in _SAME or key.rpartition(".")[2] in _SAME
    if free or actual is None or expected in (None, "???"):
        return None
    inner: Iterable[tuple[Any, Any, Any]]
    if isinstance(actual, list):
        varied = _by_position(varied, key, actual)
    if isinstance(actual, Mapping) and isinstance(expected, Mapping):
        if expected.get("_target_") == _THROUGH_THE_MODEL and not _same_precision(actual, expected):
            return f"{key}.precision"
        inner = ((name, actual[name], expected[name]) for name in actual if name in expected)
    elif (
        isinstance(actual, list)
        and isinstance(expected, list)
        and len(actual) == len(known := _known(actual, expected))
    ):
        inner = (
            (index, actual_item, expected_item)
            for index, (actual_item, expected_item) in enumerate(zip(actual, known, strict=True))
        )
    else:
        return None if actual == expected else key
    conflicts = (
        contradiction(actual_item, expected_item, f"{key}.{name}".lstrip("."), varied)
        for name, actual_item, expected_item in inner
    )
    return next((name for name in conflicts if name is not None), None)
