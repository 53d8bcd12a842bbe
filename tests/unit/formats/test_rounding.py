"""Rounding that lets gradients through."""

import subprocess
import sys

import torch

from lsiq.formats import rounding

FIRST = """
import torch
from torch.utils.checkpoint import checkpoint
from lsiq.formats.grid import round_through
x = torch.ones(3, requires_grad=True)
y = checkpoint(lambda x: (x * round_through(1.2 * x)).sin(), x, use_reentrant=False)
y.sum().backward()
assert torch.allclose(x.grad, 2.2 * torch.ones(3).cos()), x.grad
"""


def test_that_rounding_may_first_be_used_in_a_checkpointed_step():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_that_it_is_known_whether_clamp_passes_gradients_at_the_ends_of_its_range():
    x = torch.ones(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(x.clamp(0, 1).sum(), x)
    assert bool(gradient) is rounding._ENDS_PASS
    (gradient,) = torch.autograd.grad(rounding.clip(x, 0, 1).sum(), x)
    assert gradient == 1
