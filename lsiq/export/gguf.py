"""GGUF: one file with weights and tokenizer, as llama.cpp reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import ConfigError
from lsiq.export.base import (
    Destination,
    Loader,
    Logits,
    installed,
    integers,
    refuse_activations,
    refuse_cache,
    refuse_float,
    refuse_wide_scales,
    rounded_formats,
)
from lsiq.export.gguf_types import BLOCK, RANGES
from lsiq.formats.mxfp import MXFP
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.export.source import Source
    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.result import BlockResult


FILE = "model.gguf"


@settings
class GGUF(Destination):
    """`auto` takes the smallest type that holds the run's grid exactly; F32 and F16 hold de-quantised weights.

    A code stands for `scale · (code - zero)`, and `code - zero` is a whole number: the types below hold it as it is,
    the scale repeated for every 32 inputs. Numbers of asymmetric grids reach from `-(2^bits - 1)` to `2^bits - 1`,
    those of symmetric ones from `-2^(bits-1)` to `2^(bits-1) - 1`:

        Q4_0 (4.5 bits per weight)   -8 …   7    asymmetric 2, 3;  symmetric 2 to 4
        Q5_0 (5.5)                  -16 …  15    asymmetric 4;     symmetric 5
        Q8_0 (8.5)                 -128 … 127    asymmetric 5 to 7; symmetric 6 to 8

    MXFP4 (4.25) holds 4-bit floating-point numbers in blocks of 32, codes and powers of two as they are.
    Norms and biases are float32; embeddings and head keep their width, or are of the type of their own format.
    """

    type: Literal["auto", "Q4_0", "Q5_0", "Q8_0", "MXFP4", "F16", "F32"] = Field(
        "auto", description="auto, Q4_0, Q5_0, Q8_0, MXFP4, F16 or F32"
    )
    round_scales: bool = Field(False, description="true rounds the float32 scales of a run to float16")

    @property
    def name(self) -> str:
        return "gguf"

    @property
    def usage(self) -> str:
        return f'from llama_cpp import Llama\nmodel = Llama("{FILE}", n_ctx=512)'

    @property
    def loaders(self) -> tuple[Loader, ...]:
        return (Loader(("transformers", "gguf", "accelerate"), _load),)

    def check(self, quant: QuantSettings) -> None:
        refuse_float(quant, "export=gguf")
        refuse_activations(quant, "export=gguf")
        refuse_cache(quant, "export=gguf")
        if self.type in ("F16", "F32"):
            return
        for fmt in rounded_formats(quant):
            self._check_format(fmt, quant)

    def _check_format(self, fmt: WeightFormat, quant: QuantSettings) -> None:
        if holds_blocks(fmt):
            if self.type not in ("auto", "MXFP4"):
                raise ValueError(
                    f"export.type={self.type} holds integers, not quant={quant.name}; use export.type=MXFP4 or auto"
                )
            return
        fmt = integers(fmt, "export=gguf", " and MXFP4 in blocks of 32")
        if self.type == "MXFP4":
            raise ValueError(
                f"export.type=MXFP4 does not hold quant={quant.name}; use quant=w4a16-mxfp4 or another type"
            )
        if (exact := exact_type(fmt)) is None:
            raise ValueError(
                f"export=gguf: no type holds an asymmetric grid of {fmt.bits} bits exactly; the nearest is Q8_0 with "
                "quant.weight.bits=7 or with quant.weight.symmetric=true; export.type=F32 holds de-quantised weights"
            )
        if self.type != "auto" and RANGES[self.type][1] < RANGES[exact][1]:
            raise ValueError(
                f"export.type={self.type} does not hold this grid of {fmt.bits} bits; the smallest type that does is "
                f"{exact}"
            )
        if fmt.group is not None and fmt.group % BLOCK:
            raise ValueError(
                f"export=gguf: a scale stands for {BLOCK} inputs, but quant.weight.group={fmt.group}; "
                f"use a multiple of {BLOCK}, or export.type=F32"
            )
        refuse_wide_scales(fmt, self.round_scales, f"export=gguf ({exact})")

    def check_model(self, source: Source) -> None:
        if installed(("gguf",))["gguf"] is None:
            raise ConfigError("export=gguf: the package gguf writes it and is not installed; install lsiq[export]")
        from lsiq.export.gguf_file import check_architecture

        self.check(source.quant)  # whose formats are known by now
        check_architecture(source)
        for name, (_, columns) in source.shapes.items():
            if self.type not in ("F16", "F32") and columns % BLOCK:
                raise ConfigError(
                    f"export=gguf: {name} has {columns} inputs, no multiple of {BLOCK}; use export.type=F32"
                )

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        from lsiq.export.source import decoded, with_half_scales

        if self.type == "F32":
            return decoded(result)
        if self.type == "F16":
            return {name: x.half() if name in result.weights else x for name, x in decoded(result).items()}
        if all(holds_blocks(weight.format) for weight in result.weights.values()):
            return decoded(result)
        return decoded(with_half_scales(result))

    def write(self, source: Source, folder: Path) -> None:
        from lsiq.export.gguf_file import write_file

        write_file(source, folder / FILE, self._type_of)

    def _type_of(self, fmt: WeightFormat) -> str:
        """Return the type that holds weights of a format."""
        kind = exact_type(fmt) if self.type == "auto" else self.type
        assert kind is not None  # `check` sees to it
        return kind


def holds_blocks(fmt: WeightFormat) -> bool:
    """Whether the type MXFP4 holds the format."""
    return isinstance(fmt, MXFP) and (fmt.element, fmt.block) == ("e2m1", BLOCK)


def exact_type(fmt: WeightFormat) -> str | None:
    """The smallest type that holds every number of the grid, `code - zero` of integers, or None."""
    if holds_blocks(fmt):
        return "MXFP4"
    fmt = integers(fmt, "export=gguf")
    low, high = (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1) if fmt.symmetric else (-fmt.levels, fmt.levels)
    return next((kind for kind, (least, most) in RANGES.items() if least <= low and high <= most), None)


def _load(folder: Path) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM

    from lsiq.export.verify import as_logits

    return as_logits(
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True)
    )
