"""Packing small whole numbers densely into 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return `codes (rows, n)`, each below `2^bits`, as `(rows, ceil(n · bits / 32))` int32.

    Each row is one stream of bits, least significant first: 32 codes fill `bits` words, and a code may straddle two.
    The last words of a row are filled up with zeros.
    """
    rows, width = codes.shape
    chunks = -(-width // _WORD)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, chunks * _WORD - width)).view(rows, chunks, _WORD)
    words = torch.zeros(rows, chunks, bits + 1, dtype=torch.int64, device=codes.device)  # the last takes no bits
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        shifted = padded[:, :, place] << shift
        words[:, :, word] |= shifted & 0xFFFFFFFF
        words[:, :, word + 1] |= shifted >> _WORD
    words = words[:, :, :bits].reshape(rows, chunks * bits)[:, : -(-width * bits // _WORD)]
    return (words - ((words >> (_WORD - 1)) << _WORD)).to(torch.int32)
