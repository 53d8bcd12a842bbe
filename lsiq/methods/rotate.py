"""Rotate: channels are rotated by random Hadamard matrices, so that no channel is an outlier; `then` rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import InputError
from lsiq.methods.base import Method
from lsiq.methods.learned import refuse_rounded_ahead
from lsiq.methods.wrapper import Transform, Wrapper
from lsiq.models.context import Context, Need
from lsiq.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.loading import Model


SEQUENCES = 64  # of the calibration that a rotation is trained on
STATES = 2**17  # of all norms together; four times as many as 24,576 took 3 % off the range of states not trained on
Place = Literal["residual", "norm", "value", "output", "down", "query_key"]


@settings
class Rotate(Wrapper):
    """Random Hadamard rotations at some places; `then` quantises the rotated block. The float function stays the same.

    | place | what is rotated | where |
    | --- | --- | --- |
    | residual | the residual stream, of the whole model | folded into the weights of all blocks |
    | value | value channels, head by head | folded into value and output projection |
    | norm | what the linears behind a norm read | online |
    | output | what the output projection reads | online |
    | down | what the last linear of the block reads | online |
    | query_key | queries and keys, head by head, after the rotary embedding | online |

    With `block` neighbours alone are mixed. A format in blocks of 16 or 32 then has each outlier spread over just the
    numbers that share its scale, and the online rotations cost as little as they can.

    An online rotation multiplies the input of a linear while the model runs; its share of the block's multiply-adds is
    the metric `online_share`, and its signs and small matrices count as stored bits. Scales cannot be folded where a
    rotation stands between producer and reader, so a learned or smoothing method in `then` leaves those channels out;
    behind `residual` and `value` it folds as ever, in the rotated channels.

    Source: QuaRot (arXiv 2404.00456, section 4): residual, value, output, down and query_key; for blocks that fit the
    format's, MR-GPTQ (arXiv 2509.23202).
    Deviation: QuaRot's output rotation is across heads only; here `output` mixes all channels. Widths without a known
    Hadamard matrix get a random rotation for their odd factor. `norm` is for models whose stream cannot be rotated.
    QuaRot takes 0.9 of the range of activations, which are symmetric there, and 0.95 of that of keys and values; here
    the format says so (`quant.activation.clip=0.9`, `quant.kv.clip=0.95`, 1 by default). It searches clips of the
    weights, which `then` may do.

    With `steps` the rotation of the stream is trained from there on: `lsiq.linalg.narrow_rotation` has the loss and its
    sources.
    """

    places: list[Place] = Field(
        ["residual", "value", "down", "query_key"],
        min_length=1,
        description="a list of residual, norm, value, output, down and query_key",
    )
    block: int | None = Field(
        None,
        ge=2,
        description="channels rotated together: the largest divisor of a width up to this, or null for all of a place",
    )
    steps: int = Field(
        0,
        ge=0,
        description="steps in which the rotation of the residual stream is trained until ranges of what the linears "
        "behind norms read are narrow; 0 leaves it random",
    )
    then: Method = Field(description="the method that quantises the rotated block")
    label = "rotate"

    def __post_init__(self) -> None:
        if len(set(self.places)) < len(self.places):
            raise ValueError(f"places={self.places}: names one place twice; each may stand once")
        if not {"residual", "value"}.issuperset(self.places):
            refuse_rounded_ahead(self.then)
        if self.steps and "residual" not in self.places:
            raise ValueError(
                f"steps={self.steps}: trains the rotation of the residual stream, which is not among the places; add "
                "residual, or set steps=0"
            )
        if self.steps and self.block is not None:
            raise ValueError(
                f"steps={self.steps}: trains a rotation of all channels, but block={self.block} rotates few together; "
                "set block=null or steps=0"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | frozenset[Need]({"inputs"} if self.steps else ())

    @property
    def at_inference(self) -> str | None:
        """What has to be done while the quantised model runs; None where everything is folded."""
        return None if self.places == ["value"] else "rotations"

    def prepare_model(self, model: Model, tokens: Tensor | None, batch: int, generator: torch.Generator) -> Model:
        """Return the model with its residual stream rotated, if that is among the places.

        Raises:
            InputError: the model's norms cannot be moved into the linears behind them.
        """
        from lsiq.models.residual import residual_rotation

        if "residual" not in self.places:
            return model
        if (reason := model.spec.why_not_rotatable(model.config)) is not None:
            raise InputError(f"method.places={self.places}: the residual stream cannot be rotated, for {reason}")
        rotation = residual_rotation(model.config.hidden_size, model.spec.norm_subtracts_mean, generator, self.block)
        rotation = rotation.to(model.device)
        rotated = replace(model, residual=rotation if model.residual is None else model.residual @ rotation)
        if not self.steps:
            return rotated
        assert tokens is not None  # the method asks for a stream
        assert rotated.residual is not None
        return replace(rotated, residual=rotated.residual @ self._narrow(rotated, tokens, batch, generator))

    def _narrow(self, rotated: Model, tokens: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """Return the rotation that follows a random one, trained on the float model's states."""
        from lsiq.calib.normed_states import normed_states
        from lsiq.linalg.narrow_rotation import narrow_rotation
        from lsiq.runtime import processes
        from lsiq.runtime.terminal import show_progress

        states = normed_states(rotated, tokens[:SEQUENCES], batch, STATES, generator)
        with show_progress("rotation", self.steps) as progress:
            narrow = narrow_rotation(states, rotated.spec.norm_subtracts_mean, self.steps, generator, progress.advance)
        return processes.from_first(narrow.cpu()).to(narrow)

    def transform(self, block: Block, quant: QuantSettings, context: Context) -> Transform:
        from lsiq.linalg.rotation import factored_hadamard

        folded = self._fold_value(block, context) if "value" in self.places else {}
        widths = {name: block.weights[f"{name}.weight"].shape[1] for name in block.spec.inputs(self.places)}
        if "query_key" in self.places:
            widths["query_key"] = block.head_dim
        rotations = {place: factored_hadamard(width, context.generator, self.block) for place, width in widths.items()}
        return Transform(folded, rotations=rotations)

    def _fold_value(self, block: Block, context: Context) -> dict[str, Tensor]:
        from lsiq.linalg.hadamard import random_hadamard
        from lsiq.models.folding import fold_value_rotation

        for group in block.groups:
            if group.kind == "value":
                like = block.weights[f"{group.producer}.weight"]
                rotation = random_hadamard(block.head_dim, context.generator, self.block).to(like)
                return fold_value_rotation(block.weights, group, rotation, block.head_dim)
        raise InputError(
            "method.places: value cannot be folded behind a method that rotates the output projection's input; "
            "leave value out of the inner one"
        )
