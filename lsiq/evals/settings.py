"""What a run measures, as checked settings."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from lsiq.data.settings import Corpus
from lsiq.settings import settings


def _task_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise ValueError("not the name of a task (letters, digits and . _ + -)")
    return name


TaskName = Annotated[str, AfterValidator(_task_name), Field(description="a task of lm-evaluation-harness by name")]


@settings
class EvalSettings:
    """What is measured on the float and the quantised model."""

    corpora: list[Corpus] = Field(description="corpora by name, or an empty list to measure nothing")
    path: str | None = Field(None, description="the text to read for the corpus named file")
    local: dict[str, str | None] = Field(default_factory=dict, description="local copies of hub corpora, by name")
    fields: list[str] = Field(["text"], min_length=1, description="the fields of a jsonl line that hold text")
    seqlen: int = Field(ge=8, description="tokens per window, at least 8")
    batch: int = Field(8, ge=1, description="windows that pass through a block at once, at least 1")
    rtn: bool = Field(True, description="true measures round-to-nearest beside the method")
    windows: int | None = Field(None, ge=1, description="measure only the first windows; null measures all")
    divergence: bool = Field(True, description="true compares with the float model token by token")
    tasks: list[TaskName] = Field(default_factory=list, description="tasks of lm-evaluation-harness by name, or empty")
    tasks_local: dict[str, str | None] = Field(
        default_factory=dict, description="by task, a jsonl file of its items instead of the hub's data"
    )
    items: int | None = Field(None, ge=1, description="measure only the first items of each task; null measures all")
    tf32: bool = Field(
        False, description="true measures a float32 model on a GPU with products in TF32, which has 10 bits of mantissa"
    )

    def __post_init__(self) -> None:
        if "file" in self.corpora and self.path is None:
            raise ValueError("path=null: eval=file reads a text of yours; give eval.path=FILE (txt, txt.xz, jsonl)")
        for name, path in self.local.items():
            if path is not None and name not in self.corpora:
                raise ValueError(f"local.{name}={path}: {name} is not among eval.corpora={self.corpora}")
        for name, path in self.tasks_local.items():
            if path is not None and name not in self.tasks:
                raise ValueError(f"tasks_local.{name}={path}: {name} is not among eval.tasks={self.tasks}")
