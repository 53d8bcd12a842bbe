"""How far fine-tuning has come, on the disk: a run that is stopped goes on from there to the very same result."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.models.result import BlockResult
from lsiq.results.block_file import to_result, to_tensors
from lsiq.runtime import processes
from lsiq.runtime.files import Stored

if TYPE_CHECKING:
    from lsiq.runtime.unfinished import Unfinished

# A stop costs three minutes of training, or where the state takes long to write, ten times as long as that takes.
SECONDS, TIMES_WRITING = 180.0, 10.0


@dataclass
class Course:
    """Where the training of a window stands, between two steps.

    Attributes:
        steps: how many are behind.
        size: how many sequences pass at once.
        losses: the means of its finished epochs.
        sums: the losses of the batches since.
    """

    steps: int
    size: int
    losses: list[float] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)


class Progress:
    """What is kept of windows that are trained, and of the one in training.

    Args:
        unfinished: where; None for nowhere.
        form: names what is trained at once: what was kept in another form is not taken up.
    """

    def __init__(self, unfinished: Unfinished | None, form: Mapping[str, Any]) -> None:
        self._unfinished, self._form = unfinished, json.dumps(form, sort_keys=True)
        self._written, self._wait = time.monotonic(), SECONDS

    @property
    def due(self) -> bool:
        """Whether so much has been done since the state was last written that it should be again."""
        return self._unfinished is not None and time.monotonic() - self._written > self._wait

    def write_window(self, number: int, results: Mapping[int, BlockResult]) -> None:
        """Keep the blocks that a window was trained to, by index."""
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for index, result in results.items():
            block_tensors, block_metadata = to_tensors(result)
            tensors |= {f"{index}/{name}": tensor for name, tensor in block_tensors.items()}
            metadata[str(index)] = json.dumps(block_metadata)
        self._write(f"window_{number:03d}", tensors, {"blocks": json.dumps(metadata)})

    def read_window(self, number: int) -> dict[int, BlockResult] | None:
        """Return the blocks that a window was trained to, by index; None where they are not there."""
        stored = self._read(f"window_{number:03d}")
        if stored is None:
            return None
        assert self._unfinished is not None
        results = {}
        for index, metadata in json.loads(stored.metadata["blocks"]).items():
            tensors = {
                name.removeprefix(f"{index}/"): tensor
                for name, tensor in stored.tensors.items()
                if name.startswith(f"{index}/")
            }
            file = self._unfinished.folder / f"window_{number:03d}.safetensors"
            results[int(index)] = to_result(file, replace(stored, tensors=tensors, metadata=json.loads(metadata)))
        return results

    def write_state(self, number: int, optimizer: torch.optim.Optimizer, course: Course) -> None:
        """Keep the state of the window in training."""
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(_parameters(optimizer)):
            tensors[f"{index}/parameter"] = parameter
            tensors |= {f"{index}/{name}": value for name, value in optimizer.state[parameter].items()}
        if course.sums:
            tensors["sums"] = torch.stack(course.sums)
        described = {"window": number, "steps": course.steps, "size": course.size, "losses": course.losses}
        self._write("state", tensors, {"course": json.dumps(described)})
        self._written = time.monotonic()
        self._wait = max(SECONDS, TIMES_WRITING * (self._written - start))

    def read_state(self, number: int, optimizer: torch.optim.Optimizer) -> Course | None:
        """Bring the parameters and their optimizer to where the window's training stood; None where nothing is kept."""
        stored = self._read("state")
        if stored is None or (course := json.loads(stored.metadata["course"])).pop("window") != number:
            return None
        _restore(optimizer, stored.tensors)
        device = next(iter(_parameters(optimizer))).device
        sums = stored.tensors.get("sums")
        return Course(**course, sums=[] if sums is None else list(sums.to(device)))

    def _write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        if self._unfinished is not None:
            self._unfinished.write(name, tensors, {**metadata, "form": self._form})

    def _read(self, name: str) -> Stored | None:
        """Return what is kept under a name; of several processes all do or none."""
        stored = None if self._unfinished is None else self._unfinished.read(name)
        exists = stored is not None and stored.metadata["form"] == self._form
        return stored if all(processes.gather(exists)) else None


def _parameters(optimizer: torch.optim.Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        prefix = f"{index}/"
        values = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        parameter.copy_(values.pop("parameter"))
        if values:  # none before the first step, and of what never had a gradient
            states[index] = values
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
