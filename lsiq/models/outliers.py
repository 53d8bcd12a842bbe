"""Planted outliers: a float model that computes what it did, with the giant channels that large models have.

Small models hardly have the outlier channels that make 4-bit activations hard. They can be planted without changing
the function: channels are multiplied where they are written and divided where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.models.folding import channels_of, fold_scale
from lsiq.models.spec import Group, ModelSpec

# Which channels are giant belongs to the model, not to a run: every seed quantises the same planted model.
_SEED = 0


@dataclass(frozen=True)
class PlantedOutliers:
    """`count` channels of each producer made `strength` times as large.

    They are planted between norms and what reads them, values and output projection, and before the last linear of a
    block, where no smoothing of SmoothQuant or OmniQuant reaches. The same channels are giant in every block, as in
    large models.

    What this is not: outliers that training made. A scale per channel undoes what was planted wherever a method has
    one (SmoothQuant's is equivariant: what is planted changes nothing but its scale), and no token is special.
    """

    count: int
    strength: float

    def apply(self, weights: Mapping[str, Tensor], spec: ModelSpec, head_dim: int) -> dict[str, Tensor]:
        """Return all tensors of a block with its outliers planted; the function stays the same."""
        planted = dict(weights)
        for group in (*spec.groups, *spec.homogeneous):
            planted |= fold_scale(planted, group, self._scale(planted, group), head_dim)
        return planted

    def _scale(self, weights: Mapping[str, Tensor], group: Group) -> Tensor:
        """What the group's channels are divided by, `(channels,)`."""
        weight = weights[f"{group.producer}.weight"]
        channels = channels_of(weights, group)
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(_SEED))
        scale = weight.new_ones(channels)
        scale[order[: self.count].to(weight.device)] = 1 / self.strength
        return scale
