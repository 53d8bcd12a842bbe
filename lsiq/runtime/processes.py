"""Several processes that carry out one run together, launched by torchrun: who holds what, and how they agree.

Each process holds a contiguous share of the calibration sequences, and of every batch it passes its share through the
block, so all of them take the very steps that one process would. What is gathered of the sequences is reduced over the
processes before anything is decided by it. A process alone finds every function here to be the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lsiq.errors import ConfigError, EchoError, LsiqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


T = TypeVar("T")
# A process waits this long for the others; the first may have a large file to read. Those that die are not waited for.
_PATIENCE = datetime.timedelta(hours=6)


@dataclass
class _Group:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None  # of torch.distributed: keys that all processes see


_group = _Group()


def rank() -> int:
    return _group.rank


def size() -> int:
    """How many processes carry out this run."""
    return _group.size


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _group.rank == 0


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def together(device: str, multirun: bool = False) -> Iterator[None]:
    """Be one of the processes of a run while this lasts, if torchrun started several.

    Only the first speaks. An error of one ends all, with one message: that of the process which failed first.

    Args:
        device: as the configuration names it.
        multirun: whether the run is a job of a sweep.

    Raises:
        ConfigError: fewer GPUs than processes on this machine, one GPU named for all, or a sweep.
    """
    if not launched():
        yield
        return
    try:
        _join(device, multirun)
        yield
    except BaseException as error:  # noqa: BLE001 (it is raised again)
        raise cause(error) from None
    _leave()


def _join(device: str, multirun: bool) -> None:
    """Meet the other processes."""
    from lsiq.runtime.garbage import uncollected_imports
    from lsiq.runtime.terminal import hush

    with uncollected_imports():
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.rendezvous import rendezvous

    local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    _group.rank, _group.size, _group.local_rank = int(os.environ["RANK"]), world, local
    if not first():
        hush()
    cuda = device != "cpu" and torch.cuda.is_available()
    store, _, _ = next(rendezvous("env://"))
    _group.store = PrefixStore("lsiq", store)
    if multirun:
        raise ConfigError("-m: torchrun carries out one run with several processes; give sweeps a launcher instead")
    if cuda and device != "auto":
        raise ConfigError(f"device={device}: each of {world} processes has a GPU of its own; use device=auto or cpu")
    local_size, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if cuda and local_size > gpus:
        raise ConfigError(f"device={device}: {local_size} processes and {gpus} GPUs; use --nproc-per-node={gpus}")
    if cuda:
        torch.cuda.set_device(local)
    if os.environ.get("OMP_NUM_THREADS") == "1":  # what torchrun sets where nobody said how many
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("group", _group.store),
        rank=_group.rank,
        world_size=world,
        timeout=_PATIENCE,
    )


def _leave() -> None:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def local_rank() -> int:
    """The place among the processes of this machine, which is also the number of this process's GPU."""
    return _group.local_rank


def cause(error: BaseException) -> BaseException:
    """Return `error`, or where another process failed before this one an EchoError with that one's message."""
    if _group.size == 1 or isinstance(error, EchoError):
        return error
    message = str(error) if isinstance(error, LsiqError) else f"{type(error).__name__}: {error}"
    entry = _group.store.compare_set("failed", "", f"{_group.rank} {message}").decode()
    failed, _, reason = entry.partition(" ")
    return error if failed == str(_group.rank) else EchoError(reason)


def from_first(value: T) -> T:
    """Return what the first process has, whatever the others have."""
    if _group.size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Return what each process has, in their order."""
    if _group.size == 1:
        return [value]
    import torch.distributed as dist

    box: list[Any] = [None] * _group.size
    dist.all_gather_object(box, value)
    return box


def wait() -> None:
    """Go on when all processes have come here."""
    if _group.size > 1:
        import torch.distributed as dist

        dist.barrier()


def share(count: int, process: int | None = None) -> slice:
    """Return which of `count` things in a row belong to a process, this one by default; they differ by one at most."""
    process = _group.rank if process is None else process
    least, extra = divmod(count, _group.size)
    start = process * least + min(process, extra)
    return slice(start, start + least + (process < extra))


def add(tensor: Tensor) -> Tensor:
    """Return the sum of the processes' tensors, written over this one's."""
    return _reduce(tensor, "SUM")


def largest(tensor: Tensor) -> Tensor:
    """Return the largest of the processes' tensors entry by entry, written over this one's."""
    return _reduce(tensor, "MAX")


def least(tensor: Tensor) -> Tensor:
    """Return the smallest of the processes' tensors entry by entry, written over this one's."""
    return _reduce(tensor, "MIN")


def _reduce(tensor: Tensor, operation: str) -> Tensor:
    if _group.size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def add_number(value: float) -> float:
    """Return the sum of the processes' numbers, in float64."""
    if _group.size == 1:
        return value
    import torch

    return add(torch.tensor(value, dtype=torch.float64)).item()


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by the sum over the processes: one message for each dtype."""
    if _group.size == 1:
        return
    import torch

    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        if len(gradients) == 1:
            add(gradients[0])
            continue
        flat = add(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the first process."""
    if _group.size == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        dist.broadcast(tensor, 0)


def divided(
    costs: Mapping[str, float], work: Callable[[str], tuple[Tensor, ...]], device: torch.device
) -> dict[str, tuple[Tensor, ...]]:
    """Return `work(item)` for all items, each done by one process and handed to the others.

    Args:
        costs: by item, what it costs beside the others.
        device: where the results lie.
    """
    if _group.size == 1:
        return {item: work(item) for item in costs}
    owners = _spread(costs)
    results = {item: work(item) for item in costs if owners[item] == _group.rank}
    import torch
    import torch.distributed as dist

    shapes = {
        item: kinds
        for shares in gather({item: [(t.shape, t.dtype) for t in result] for item, result in results.items()})
        for item, kinds in shares.items()
    }
    for item in costs:
        tensors = [t.contiguous() for t in results[item]] if item in results else []
        results[item] = tuple(
            tensors or (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes[item])
        )
        for tensor in results[item]:
            dist.broadcast(tensor, owners[item])
    return {item: results[item] for item in costs}


def _spread(costs: Mapping[str, float]) -> dict[str, int]:
    """Give each item to a process, the costliest first, each to the one that has least to do."""
    loads, owners = [0.0] * _group.size, dict[str, int]()
    for item in sorted(costs, key=lambda item: -costs[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return owners
