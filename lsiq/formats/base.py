"""What a number format of weights and one of activations are."""

from __future__ import annotations

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.mxint import MXActivation, MXInt

WeightFormat = Integer | MXInt
ActivationFormat = Activation | MXActivation
