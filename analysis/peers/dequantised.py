"""Write a package's result as a plain float32 checkpoint, so that this project measures every package alike."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write(folder: Path, weights: Mapping[str, torch.Tensor], out: Path) -> None:
    """Put `weights` in the place of those of the checkpoint `folder` and write model and tokenizer to `out`.

    Entries that the plain model does not have, such as scales, are left out; all others must be there.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = model.state_dict()
    model.load_state_dict({name: tensor.float().cpu() for name, tensor in weights.items() if name in plain})
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
