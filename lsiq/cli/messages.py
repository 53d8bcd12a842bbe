"""Errors on the command line: one line on stderr and an exit status, without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from lsiq.errors import EchoError, LsiqError
from lsiq.runtime.redaction import redacted
from lsiq.runtime.signals import Terminated

# Hydra's own options; it answers a misspelt one with a page of usage.
_FLAGS = (
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run"),
    *("-m", "--multirun", "-s", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name"),
    *("-cd", "--config-dir", "--experimental-rerun", "-i", "--info"),
)


def explain_hydra(error: Exception, groups: dict[str, list[str]]) -> str:
    """One line for an error that hydra or omegaconf raised while composing.

    Args:
        error: the exception; its cause usually carries the rule that was broken.
        known: the choices by config group, to name what may be written instead.
    """
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))
    if match := re.search(r"Could not override '([\w.@/-]+)'", text):
        key = match[1]
        group = key.split(".")[0]
        hint = f"python run.py {group}=… --cfg job shows the keys of {group}" if group in groups else top_level_hint()
        return f"{key}: no such setting; {hint}"
    if match := re.search(r"Could not find '([\w./-]+)/([^']*)'", text):
        group, choice = match[1], match[2]
        return f"{group}={choice}: no such choice; use one of {', '.join(groups.get(group, []))}"
    if match := re.search(r"Could not append to config\. An item is already at '([\w.]+)'", text):
        return f"+{match[1]}: the key exists already; leave out the + to change it"
    if match := re.search(r"Error merging override ([\w.@/-]+)=(.).* Cannot merge DictConfig with ListConfig", text):
        key = match[1]
        return (
            f"{key}: holds keys and no list; write {key}.KEY=value"
            if match[2] == "["
            else (f"{key}: is a list; write {key}=[…]")
        )
    if "parsing override" in text or "mismatched input" in text or "no viable alternative" in text:
        return f"{text}; an override reads key=value, and a value with blanks or commas stands in quotes"
    return text


def top_level_hint() -> str:
    return "python run.py --help lists the groups and keys"


@contextlib.contextmanager
def one_line(multirun: bool) -> Iterator[None]:
    """End a job that failed by the user's error with one line; in a sweep the other jobs go on.

    Hydra would print a line of its own before it hands the error on.
    """
    try:
        yield
    except LsiqError as error:
        if isinstance(error, EchoError):
            sys.exit(1)
        if _wants_trace():
            raise
        if not multirun:
            sys.exit(redacted(f"error: {error}"))
        print(redacted(f"error: {error}"), file=sys.stderr)
        raise


def _wants_trace() -> bool:
    return any(word.startswith("debug=") or word == "trace=true" for word in sys.argv)


@contextlib.contextmanager
def reporting(conf: Path) -> Iterator[None]:
    """Turn errors that are the user's to mend into one line on stderr and an exit status other than 0.

    `debug=…` or `trace=true` on the command line keeps the traceback.

    Args:
        conf: the folder of configuration groups, to name what may be chosen.
    """
    if unknown := [word for word in sys.argv[1:] if word.startswith("-") and word.split("=")[0] not in _FLAGS]:
        near = difflib.get_close_matches(unknown[0], _FLAGS, n=1)
        hint = f"did you mean {near[0]}?" if near else "settings read key=value; --help lists them"
        sys.exit(f"error: {unknown[0]}: no such option; {hint}")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra hands its errors on instead of printing several lines
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lsiq.cli.hydra_guard import guarded

    try:
        with guarded():
            yield
    except (LsiqError, HydraException, OmegaConfBaseException) as error:
        if _wants_trace():
            raise
        message = str(error) if isinstance(error, LsiqError) else explain_hydra(error, choices(conf))
        # Of several processes that torchrun started all come here alike; the first one says it.
        echo = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"
        sys.exit(1 if echo else redacted(f"error: {message}"))
    except ValueError as error:
        if "Config group override" not in str(error) or _wants_trace():
            raise
        groups = ", ".join(choices(conf))
        sys.exit(
            f"error: {error}: an override reads group=choice or key=value, and of a group ({groups}) only a choice"
        )
    except KeyboardInterrupt as error:
        from lsiq.results.record import command_line

        detail = f"{error}; " if str(error) else ""
        print(f"interrupted: {detail}go on with: {command_line()}", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT))


@contextlib.contextmanager
def while_read() -> Iterator[None]:
    """End quietly, as other tools do, when who reads the output stops reading it: `lsiq --help | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more when it ends
        sys.exit(128 + signal.SIGPIPE)


def choices(conf: Path) -> dict[str, list[str]]:
    """Return the names of the files of each configuration group."""
    groups = [*sorted(conf.iterdir()), *sorted((conf / "hydra").glob("*"))]
    return {
        str(group.relative_to(conf)): sorted(file.stem for file in group.glob("*.yaml"))
        for group in groups
        if group.is_dir() and group.name != "hydra"
    }
