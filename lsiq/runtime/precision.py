"""In which precision blocks are trained where the settings leave it to the machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lsiq.runtime import processes
from lsiq.runtime.files import write_text
from lsiq.runtime.terminal import warn

# Rows, inputs and outputs of the product that is timed: four sequences through a linear of the bundled model.
SHAPE = (2048, 384, 1024)
# Beside the products a step does much that gains nothing from bfloat16, and a busy machine adds noise to the timing.
WORTH_IT = 1.25
_TRIES = 7
# What the kernels of torch and oneDNN may be kept from using; either makes another CPU of this one.
_SWITCHES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Choice:
    """A precision, and why it was chosen.

    Attributes:
        chosen: float32, bfloat16 or float16.
    """

    chosen: str
    why: str


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """While this lasts, a GPU multiplies float32 matrices in TF32, ten bits of mantissa, where that is wanted."""
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = wanted or before
    try:
        yield
    finally:
        products.allow_tf32 = before


def name_of(dtype: torch.dtype) -> str:
    """What tensors of a type are multiplied in: float32, tf32, bfloat16 or float16."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else _name(dtype)


def fastest(device: torch.device, dtype: torch.dtype, cache: Path | None = None) -> Choice:
    """Return the precision that `precision=auto` stands for on a device.

    On a CPU it is bfloat16 where the CPU has instructions for it and a product of a block's shape comes out faster in
    it, else float32. On a GPU it is bfloat16 where the GPU multiplies it, else the model's.

    Args:
        dtype: the model's precision.
        cache: the folder where a machine keeps what it found, so that it always decides alike; None keeps nothing.
    """
    if dtype.itemsize == 2:
        return Choice(_name(dtype), "the model's own")
    if device.type == "cpu":
        return _on_cpu(cache)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice("bfloat16", "the GPU multiplies it")
    return Choice(_name(dtype), "the model's own")


@functools.cache
def _on_cpu(cache: Path | None) -> Choice:
    """`fastest` on this CPU: what `cache` says, or what is found now and kept there; all processes choose alike."""
    file = None if cache is None else cache / "precision" / f"{_machine()}.json"
    choice = _read(file)
    if choice is None:
        choice = _measured_here()
        if file is not None and processes.first():
            _keep(file, choice)
    return processes.from_first(choice)


@functools.cache
def _measured_here() -> Choice:
    if not (names := bfloat16_features()):
        return Choice("float32", "the CPU has no bfloat16 instructions")
    with torch.inference_mode():
        gain = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
    shape = " x ".join(map(str, SHAPE))
    # The gain itself is another one each time; records of one machine say the same.
    enough, compared = gain >= WORTH_IT, "at least" if gain >= WORTH_IT else "less than"
    why = f"{', '.join(names)}; a product {shape} runs {compared} {WORTH_IT} times as fast as in float32"
    return Choice("bfloat16" if enough else "float32", why)


def bfloat16_features() -> list[str]:
    """Return the names of this CPU's bfloat16 instructions; empty where it has none."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16") if capabilities.get(name)]


def product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest time of some products of `SHAPE` in a precision; other work makes them longer only."""
    rows, inputs, outputs = SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    w = torch.randn(outputs, inputs, generator=generator).to(dtype)
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return min(times)


def _machine() -> str:
    """A hash of what decides how fast this CPU multiplies: the CPU, the version of torch, and the switches of both."""
    capabilities = torch.cpu.get_capabilities()
    parts = [
        platform.machine(),
        capabilities,
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        SHAPE,
        WORTH_IT,
    ]
    parts += [os.environ.get(name, "").upper() for name in _SWITCHES]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _read(file: Path | None) -> Choice | None:
    if file is None:
        return None
    try:
        choice = Choice(**json.loads(file.read_text(encoding="utf-8")))
        return choice if choice.chosen in ("float32", "bfloat16") else None
    except (OSError, ValueError, TypeError):
        return None  # none yet, or a damaged one that is written again


def _keep(file: Path, choice: Choice) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(choice)) + "\n")
    except OSError as error:
        warn(f"paths.cache: {file.parent} cannot be written ({error.strerror}); set paths.cache=DIR or null")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
