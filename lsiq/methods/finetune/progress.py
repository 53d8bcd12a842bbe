"""How far fine-tuning has come, on the disk: a run that is stopped goes on from there to the very same result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.models.result import BlockResult
from lsiq.results.block_file import to_result, to_tensors
from lsiq.runtime import processes
from lsiq.runtime.files import Stored
from lsiq.runtime.pace import Pace

if TYPE_CHECKING:
    from lsiq.runtime.unfinished import Unfinished

# A stop costs three minutes of training, or more where the state takes long to write.
SECONDS = 180.0


@dataclass
class Course:
    """Where training stands between two steps.

    Attributes:
        group, steps: how many groups are behind, and how many steps of the one in training.
        size: how many sequences pass at once.
        losses: the means of the finished epochs of this group.
        sums: the losses of the batches since.
    """

    group: int
    steps: int
    size: int
    losses: list[float] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)


class Progress:
    """Where training stood when the run was stopped, and where it stands.

    Args:
        unfinished: where that is kept; None for nowhere.
        form: what is trained at once: a state of another form is not taken up.

    Attributes:
        stored: where an earlier try stopped; None where there is none, or once the training is there.
    """

    def __init__(self, unfinished: Unfinished | None, form: Mapping[str, Any]) -> None:
        self._unfinished, self._form = unfinished, json.dumps(form, sort_keys=True)
        self._pace = Pace()
        stored = None if unfinished is None else unfinished.read("state")
        exists = stored is not None and stored.metadata["form"] == self._form
        self.stored: Stored | None = stored if all(processes.gather(exists)) else None

    @property
    def due(self) -> bool:
        """Whether so much has been done since the state was last written that it should be again."""
        return self._unfinished is not None and self._pace.due(SECONDS)

    def write(
        self,
        course: Course,
        optimizers: Sequence[torch.optim.Optimizer],
        settled: Mapping[int, Mapping[str, Tensor]],
        finished: Mapping[int, BlockResult],
    ) -> None:
        """Keep where training stands.

        Args:
            settled: by index, what blocks of this group's earlier windows keep.
            finished: by index, the blocks of earlier groups.
        """
        if self._unfinished is None:
            return
        tensors = {f"settled/{i}/{name}": tensor for i, block in settled.items() for name, tensor in block.items()}
        for number, optimizer in enumerate(optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                place = f"optimizer/{number}/{index}"
                tensors[f"{place}/parameter"] = parameter
                tensors |= {f"{place}/{name}": value for name, value in optimizer.state[parameter].items()}
        if course.sums:
            tensors["sums"] = torch.stack(course.sums)
        blocks: dict[int, dict[str, str]] = {}
        for index, result in finished.items():
            block, blocks[index] = to_tensors(result)
            tensors |= {f"block/{index}/{name}": tensor for name, tensor in block.items()}
        facts = asdict(replace(course, sums=[]))
        metadata = {"form": self._form, "course": json.dumps(facts), "blocks": json.dumps(blocks)}
        with self._pace.writing():
            self._unfinished.write("state", tensors, metadata)

    def course(self, device: torch.device) -> Course | None:
        """Return where an earlier try stopped."""
        if self.stored is None:
            return None
        sums = self.stored.tensors.get("sums")
        sums = [] if sums is None else list(sums.to(device))
        return Course(**{**json.loads(self.stored.metadata["course"]), "sums": sums})

    def finished(self) -> dict[int, BlockResult]:
        """Return the blocks of groups that an earlier try finished, by index."""
        if self.stored is None or self._unfinished is None:
            return {}
        return {
            int(index): to_result(
                self._unfinished.folder / "state.safetensors",
                replace(self.stored, tensors=self._below(f"block/{index}/"), metadata=metadata),
            )
            for index, metadata in json.loads(self.stored.metadata["blocks"]).items()
        }

    def settled(self) -> dict[int, dict[str, Tensor]]:
        """Return, by index, what blocks of earlier windows keep."""
        blocks: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self._below("settled/").items():
            index, _, name = key.partition("/")
            blocks.setdefault(int(index), {})[name] = tensor
        return blocks

    def restore(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Bring parameters and optimizers to where an earlier try stopped, and let go of what was kept of it."""
        for number, optimizer in enumerate(optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for index, parameter in enumerate(_parameters(optimizer)):
                values = self._below(f"optimizer/{number}/{index}/")
                with torch.no_grad():
                    parameter.copy_(values.pop("parameter"))
                if values:  # none before the first step, and of what never had a gradient
                    states[index] = values
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        self.stored = None

    def _below(self, prefix: str) -> dict[str, Tensor]:
        tensors = {} if self.stored is None else self.stored.tensors
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
