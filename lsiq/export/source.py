"""What an export reads: the model as it came, and the blocks that a run made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsiq.errors import InputError
from lsiq.models.folder import read_config
from lsiq.models.loading import Model
from lsiq.models.outside import outside_names, quantized_outside
from lsiq.models.result import BlockResult, result_weights
from lsiq.results.memory_store import MemoryStore
from lsiq.results.store import BlockStore

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings


NO_BRANCHES = (
    "a low-rank product runs beside each linear, which this format has no place for; use export=plain, which adds it "
    "to the weight"
)


NO_ROTATIONS = "inputs are rotated while the model runs, which no exported format has a place for; export another run"


@dataclass(frozen=True)
class Source:
    """A model, the quantised blocks of a run, and where the model came from.

    Names are those of the transformers checkpoint. Float tensors keep the width they have in the checkpoint; norms and
    biases that the method folded into are float32.

    Attributes:
        checkpoint: a folder or a GGUF file.
        tokenizer_place: the same of the tokenizer; None for the checkpoint.
    """

    model: Model
    store: BlockStore | MemoryStore
    quant: QuantSettings
    checkpoint: Path
    tokenizer_place: Path | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's configuration, as `config.json` holds it."""
        return read_config(self.checkpoint)

    @property
    def float_linears(self) -> list[str]:
        """Dotted names of the linears outside the blocks that stay in float."""
        rounded = outside_names(self.model, self.quant.outside())
        return [
            name
            for name, module in self.model.skeleton.named_modules()
            if isinstance(module, nn.Linear)
            and not name.startswith(f"{self.model.spec.blocks}.")
            and f"{name}.weight" not in rounded
        ]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` of the linears of a block, by their name inside it."""
        block = self.model.skeleton.get_submodule(f"{self.model.spec.blocks}.0")
        linears = ((name, block.get_submodule(name)) for name in self.model.spec.linears)
        return {name: (linear.out_features, linear.in_features) for name, linear in linears}  # type: ignore[misc]

    def check(self) -> None:
        """Raise InputError where the blocks belong to another model than the checkpoint: rotated, or after a prefix."""
        if self.store.changes_model():
            raise InputError(
                f"{self.store.folder}: its blocks need a rotated residual stream or a prefix, which no exported format "
                "has a place for; export another run"
            )

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Embeddings, final norm and head as far as they stay in float, a tied head left out."""
        rounded = outside_names(self.model, self.quant.outside())
        for name, parameter in self.model.skeleton.named_parameters():
            if not name.startswith(f"{self.model.spec.blocks}.") and name not in rounded:
                yield name, self.model.checkpoint.read(name, parameter.shape)

    def outside_result(self) -> BlockResult:
        """Return embeddings and head as far as they are rounded, a tied head under the name of the embeddings.

        No run stores them, so they are rounded anew, from weights in the precision that the model was loaded in. A run
        in half precision that is exported later on a CPU may have other codes where a weight lies between two.
        """
        weights = quantized_outside(self.model, self.quant.outside())
        return BlockResult({name: weight.cpu() for name, weight in weights.items()})

    def prefix(self, index: int) -> str:
        """What stands before the names of a block's tensors in the checkpoint."""
        return f"{self.model.spec.blocks}.{index}."

    def block(self, index: int, branches: bool = False) -> BlockResult:
        """Return what the run made of a block, its `floats` completed by those that stayed as they were.

        Args:
            branches: whether the format has a place for low-rank products.

        Raises:
            InputError: a block is missing or damaged, or holds low-rank products or a tensor that have no place.
        """
        module = self.model.skeleton.get_submodule(f"{self.model.spec.blocks}.{index}")
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        result = self.store.read(index)
        if result.branches and not branches:
            raise InputError(f"block {index}: {NO_BRANCHES}")
        if result.rotations:
            raise InputError(f"block {index}: {NO_ROTATIONS}")
        if strangers := sorted(set(result.floats) - set(shapes)):
            raise InputError(
                f"block {index}: the method made {', '.join(strangers)}, which {type(module).__name__} of transformers "
                "does not have, so no loader could place it; use a method that folds only into what is there"
            )
        floats = {
            name: self.model.checkpoint.read(self.prefix(index) + name, shape)
            for name, shape in shapes.items()
            if name not in result.weights and name not in result.floats
        }
        return replace(result, floats={**floats, **result.floats})


def decoded(result: BlockResult) -> dict[str, Tensor]:
    """The weights and floats of a block on the CPU, low-rank products added to the weights they run beside."""
    weights = result_weights(result, {"": torch.empty(0)})
    for name, branch in result.branches.items():
        up, down = branch.cpu().decode()
        weights[name] = weights[name] + up @ down
    return weights


def with_half_scales(result: BlockResult) -> BlockResult:
    """Return the block with its scales rounded to float16, held as float32."""
    weights = {name: replace(weight, scale=weight.scale.half().float()) for name, weight in result.weights.items()}
    return replace(result, weights=weights)
