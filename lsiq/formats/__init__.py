"""Number formats for weights and activations."""

from __future__ import annotations

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.mxint import MXActivation, MXInt
