"""The types of GGUF that hold a grid of ours, and the architectures that are written."""

from __future__ import annotations

BLOCK = 32
# Types that store `scale · number` with a float16 scale for 32 numbers in a row, and the numbers they hold. The types
# with a minimum beside the scale (Q4_1, Q5_1) round it to float16, so an asymmetric grid does not survive in them.
RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3"},
}
