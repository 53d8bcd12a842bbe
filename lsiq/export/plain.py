"""Plain: a float checkpoint with the de-quantised weights, for any program that loads the model's architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.export.base import Destination, Loader, Logits, refuse_activations, refuse_cache, refuse_float
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.export.source import Source
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.result import BlockResult


@settings
class Plain(Destination):
    """Safetensors in the transformers layout; the linears of the blocks hold the weights that their codes stand for.

    In float32 they are the run's own, bit for bit. Half precision rounds them a second time. Low-rank products are
    added to the weights they run beside, which is the same function while activations are float.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the de-quantised weights: float32 (exact), bfloat16 or float16"
    )

    @property
    def name(self) -> str:
        return "plain"

    @property
    def usage(self) -> str:
        return (
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="{self.dtype}")'
        )

    @property
    def loaders(self) -> tuple[Loader, ...]:
        return (Loader(("transformers",), _load),)

    @property
    def merges_branches(self) -> bool:
        return True

    def check(self, quant: QuantSettings) -> None:
        refuse_float(quant, "export=plain")
        refuse_activations(quant, "export=plain")
        refuse_cache(quant, "export=plain")

    def check_model(self, source: Source) -> None:
        del source  # the architecture stays as it was

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        import torch

        from lsiq.export.source import decoded

        dtype = getattr(torch, self.dtype)
        return {name: x.to(dtype) if name in result.weights else x for name, x in decoded(result).items()}

    def write(self, source: Source, folder: Path) -> None:
        from lsiq.export.shards import ShardWriter, copy_companions, write_json

        writer = ShardWriter(folder)
        for name, tensor in (*source.outside(), *self.stored(source.outside_result()).items()):
            writer.add(name, tensor)
        for index in range(source.model.depth):
            for name, tensor in self.stored(source.block(index, branches=True)).items():
                writer.add(source.prefix(index) + name, tensor)
        writer.finish()
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        write_json(folder / "config.json", {**config, "dtype": self.dtype})
        copy_companions(source, folder)


def _load(folder: Path) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM

    from lsiq.export.verify import as_logits

    return as_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True))
