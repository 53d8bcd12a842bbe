"""What an exporter is: settings that know what their format can hold, how it is written and who reads it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import Field

from lsiq.formats.base import WeightFormat
from lsiq.formats.integer import Integer
from lsiq.methods.base import Method, WholeMethod, chain
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.export.source import Source
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.result import BlockResult


# The largest difference of logits, in float32, between an export read by its foreign loader and what was written.
TOLERANCE = 1e-3
Logits = Callable[["Tensor"], "Tensor"]


@settings
class Destination:
    """Where an export goes, and whether it is read back."""

    folder: str | None = Field(None, description="the folder to write, or null for runs/<run id>/export/<format>")
    verify: bool = Field(True, description="true reads the export back with its foreign loader and compares logits")
    push: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="a repository of the Hugging Face hub, owner/name, that gets the folder (private if new), or null",
    )

    @property
    def merges_branches(self) -> bool:
        return False


@dataclass(frozen=True)
class Loader:
    """A program that is not ours and reads the format.

    Attributes:
        packages: what must be installed, by distribution name.
        load: takes the folder and returns the model as a function of token ids `(batch, T)` to logits in float32.
    """

    packages: tuple[str, ...]
    load: Callable[[Path], Logits]


@runtime_checkable
class Exporter(Protocol):
    """Settings of one format. They import without torch, so that what cannot be held is refused at once."""

    folder: str | None
    verify: bool
    push: str | None

    @property
    def name(self) -> str:
        """What the group, the record and the folder call the format."""
        ...

    @property
    def usage(self) -> str:
        """How the exported folder is loaded, in a line or two of code."""
        ...

    @property
    def loaders(self) -> tuple[Loader, ...]:
        """Who can read the export back."""
        ...

    @property
    def merges_branches(self) -> bool:
        """Whether low-rank products are added to the weights they run beside; otherwise they are refused."""
        ...

    def check(self, quant: QuantSettings) -> None:
        """Raise ValueError, naming the setting and the way out, where the format cannot hold the number formats."""
        ...

    def check_model(self, source: Source) -> None:
        """Raise ConfigError or InputError where the format cannot hold the model."""
        ...

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        """Return the tensors of a block that the files stand for: the run's own unless the settings ask to round."""
        ...

    def write(self, source: Source, folder: Path) -> None:
        """Fill the empty `folder`."""
        ...


def refuse_float(quant: QuantSettings, name: str) -> None:
    """Raise ValueError for a setting that quantises no weights."""
    if quant.formats and all(fmt.bits == 16 for fmt in quant.formats):
        raise ValueError(f"{name} holds quantised weights, but quant={quant.name} quantises none; choose another quant")


def integers(fmt: WeightFormat, name: str, beside: str = "") -> Integer:
    """Return the weight format; ValueError unless it is integers in groups, all that these formats hold.

    Args:
        beside: what the format holds besides, for the message.
    """
    if not isinstance(fmt, Integer):
        raise ValueError(
            f"{name} holds integers in groups{beside}, not quant.weight of {fmt.words}; use export=plain, or quantise "
            "to what it holds"
        )
    return fmt


def refuse_activations(quant: QuantSettings, name: str) -> None:
    """Raise ValueError for formats that hold weights alone, so that no half of a setting stands under its name."""
    if quant.activation.active:
        raise ValueError(
            f"{name} says nothing of activations, but quant={quant.name} rounds them to {quant.activation.bits} bits; "
            "use export=compressed-tensors (8 bits, or floating-point formats), or a weight-only quant"
        )


def rounded_formats(quant: QuantSettings) -> list[WeightFormat]:
    """Return the weight formats of linears that do not stay in float, head and embeddings among them."""
    return [fmt for fmt in quant.formats if fmt.bits < 16]


def refuse_outside(quant: QuantSettings, name: str) -> None:
    """Raise ValueError for layouts in which head and embeddings stay as they are."""
    if rounded := list(quant.outside()):
        raise ValueError(
            f"{name} keeps embeddings and head as they are, but quant.rules round {rounded[0]}; use "
            "export=compressed-tensors, gguf or plain, or leave that rule out"
        )


def refuse_cache(quant: QuantSettings, name: str) -> None:
    """Raise ValueError for formats that have no word for what a cache of keys and values holds."""
    if quant.kv.rounds:
        raise ValueError(
            f"{name} says nothing of keys and values, but quant={quant.name} rounds them; use "
            "export=compressed-tensors, or leave quant.kv out"
        )


def refuse_wide_scales(fmt: Integer, round_scales: bool, name: str) -> None:
    """Raise ValueError where scales of 32 bits would have to be rounded and nobody asked for it."""
    if fmt.scale != "float16" and not round_scales:
        raise ValueError(
            f"{name} holds scales of 16 bits, but quant.weight.scale={fmt.scale}; quantise with "
            "quant.weight.scale=float16, or let export.round_scales=true round the scales of this run"
        )


def refuse_method(method: Method | WholeMethod, exporter: Exporter) -> None:
    """Raise ValueError for methods whose model needs more than the format holds."""
    first = getattr(method, "start", None) or method  # fine-tuning keeps what its start is made of
    for link in chain(first):
        if link.adds_branches and not exporter.merges_branches:
            raise ValueError(
                f"export={exporter.name}: has no place for the low-rank products of method={method.name}; "
                "use export=plain, or method.rank=0"
            )
        if link.at_inference is not None:
            raise ValueError(
                f"export={exporter.name}: no format has a place for {link.at_inference}, which method={method.name} "
                "needs; use another method, or rotate with method.places=[value]"
            )


def installed(packages: tuple[str, ...]) -> Mapping[str, str | None]:
    """The version of each package, None for those that are missing."""
    import importlib.metadata

    by_package: dict[str, Any] = {}
    for package in packages:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = None
    return by_package
