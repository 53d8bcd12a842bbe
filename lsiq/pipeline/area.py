"""How large the circuits of multiply-accumulates are, beside one of half precision: an estimate, not a synthesis."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

# Area of a multiply-accumulate in half precision, in the unit in which one of two integers takes the product of their
# widths. Fitted to the three circuits of LQER's table that compute with small integers alone, relative to float16:
# 4 x 8 with a 1 % branch of 8 x 8, 0.325; 4 x 6 with 8 x 6, 0.229; 6 x 6, 0.386. Here: 0.327, 0.245, 0.360.
FLOAT16_AREA = 100

# Transistors of cells in static complementary logic; a full adder is the mirror adder (Weste and Harris, CMOS VLSI
# Design, section 11.2), a half adder an exclusive or beside an and.
AND, OR, XOR, MULTIPLEXER, HALF_ADDER, FULL_ADDER = 6, 6, 12, 12, 18, 28

LANES = 32  # that share a normaliser and an accumulator, as many as a block of MX has numbers
ALIGNED = 24  # bits to which aligned products are cut where their sum would take more, as in float32


@dataclass(frozen=True)
class Operand:
    """A sign, `exponent` and `mantissa` bits; an integer has no exponent and all bits but one in the mantissa."""

    exponent: int
    mantissa: int

    @classmethod
    def of(cls, number: str) -> Operand | None:
        """Return the operand that multiplications are counted by, `8` or `e4m3`; None where it has over 8 bits."""
        if number.isdecimal():
            return cls(0, int(number) - 1) if int(number) <= 8 else None
        match = re.fullmatch(r"e(\d+)m(\d+)", number)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @property
    def significant(self) -> int:
        """Bits that enter the multiplier: the hidden one of a float, the sign of an integer, and the mantissa."""
        return self.mantissa + 1

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


def multiplier(first: int, second: int) -> int:
    """Return the transistors of an array multiplier of so many bits each."""
    rows, columns = min(first, second), max(first, second)
    half_adders = rows if rows > 1 else 0
    full_adders = (rows - 1) * columns - half_adders
    return rows * columns * AND + half_adders * HALF_ADDER + full_adders * FULL_ADDER


def aligned_width(first: Operand, second: Operand) -> int:
    """Return the bits of a fixed-point number that holds every product of two floats exactly."""
    ranges = sum(2**operand.exponent for operand in (first, second) if operand.exponent)
    return ranges + first.mantissa + second.mantissa


def lane(first: Operand, second: Operand, aligned: int | None = ALIGNED) -> float:
    """Return the transistors of one multiply-accumulate among `LANES` that are summed together.

    Integers: the multiplier, and an adder as wide as the product. With exponents of `x` bits (the wider of both) and
    products aligned to `n` bits, the multiplier of the significands, `x` full adders for the sum of the exponents,
    `x` each of what compares and subtracts it, a barrel shifter of `n log2 n` multiplexers, an adder of `n` bits, and
    its share of a normaliser of `n log2 n` multiplexers and ors.

    Args:
        aligned: bits to which `n` is cut; None sums exactly.

    Source: the gate counts of Chen et al., INT v.s. FP (arXiv 2510.25602, table 6 and equation 44).
    Deviation: an array multiplier's own adders instead of the product of the widths; operands may differ. With
    `shared` the areas relative to MXFP8 are 0.82 for MXINT8, 0.56 for NVFP4 and 0.44 for 4-bit integers with NVFP4's
    scales; that paper's table 5, with the cells of a foundry, has 0.79, 0.54 and 0.38.
    """
    product = multiplier(first.significant, second.significant)
    exponent = max(first.exponent, second.exponent)
    if exponent == 0:
        return product + (first.significant + second.significant) * FULL_ADDER
    width = aligned_width(first, second)
    width = width if aligned is None else min(width, aligned)
    shifter = width * math.log2(width)
    exponents = exponent * (FULL_ADDER + (XOR + FULL_ADDER + HALF_ADDER) + (XOR + AND + OR))
    normaliser = shifter * (MULTIPLEXER + OR) / LANES
    return product + exponents + shifter * MULTIPLEXER + width * FULL_ADDER + normaliser


def shared(scale: str, lanes: int = LANES) -> float:
    """Return each lane's share of the float32 accumulator and of what multiplies by the scales of a block.

    Args:
        scale: `power`, two 8-bit exponents are added; `e4m3`, two numbers are multiplied, and the product by the sum.
    """
    width, exponent = 27, 8  # float32 with guard, round and sticky bits
    shifter = width * math.log2(width)
    accumulator = exponent * ((XOR + FULL_ADDER + HALF_ADDER) + (XOR + AND + OR)) + width * FULL_ADDER
    accumulator += shifter * MULTIPLEXER + shifter * (MULTIPLEXER + OR)
    if scale == "power":
        scales = 2 * 8 * FULL_ADDER
    else:
        scales = multiplier(4, 4) + 4 * FULL_ADDER + multiplier(8, 24) + 8 * FULL_ADDER
    return (accumulator + scales) / lanes


def relative_area(macs: Mapping[str, int], weights: int) -> float | None:
    """Return the circuit area of linears relative to float16 at equal throughput; None where it cannot be said.

    Args:
        macs: multiply-accumulates per token by type, weight times activation: `4x8`, `e2m1xe4m3`.
        weights: how many they would be in float16: one per original weight.

    Every type has its own multipliers, busy all the time, so areas add up by the share of the work. A multiplier of
    two integers takes the product of their widths, one of two halves `FLOAT16_AREA`; memory and control are in that
    constant or left out. One with floats takes as much more than integers of the same widths as `lane` and `shared` say
    of both, in blocks of 32 under a power of two. Circuits that mix small numbers with half precision have to convert
    between them, which costs more than the multipliers (LQER's table: 1.136 for integer weights with a float16 branch,
    14 for 4-bit weights under 16-bit activations): for them nothing is estimated.

    Source: in the manner of LQER (arXiv 2402.02446, table of circuit areas), whose synthesis is not repeated here.
    """
    if set(macs) == {"16x16"}:
        return sum(macs.values()) / weights
    area = 0.0
    for kind, count in macs.items():
        first, second = (Operand.of(number) for number in kind.split("x"))
        if first is None or second is None:
            return None
        area += count * first.bits * second.bits * over_integers(first, second) / FLOAT16_AREA
    return area / weights


def over_integers(first: Operand, second: Operand) -> float:
    """Return the area of a multiply-accumulate over that of integers of the same widths; 1 for integers."""
    integers = lane(Operand(0, first.bits - 1), Operand(0, second.bits - 1))
    return (lane(first, second) + shared("power")) / (integers + shared("power"))
