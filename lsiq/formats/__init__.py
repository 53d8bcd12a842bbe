"""Number formats for weights and activations."""

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.mxint import MXActivation, MXInt

WeightFormat = Integer | MXInt
ActivationFormat = Activation | MXActivation
