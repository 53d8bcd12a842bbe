"""Write what a public package gets: a bundled model in float32 and the calibration tokens that our runs draw.

python analysis/peers/prepare.py tiny-llama 64 DIR
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsiq.assets import bundled_model
from lsiq.data.tokens import token_hash
from lsiq.experiment.calibrate import calibration_tokens
from lsiq.experiment.config import parse
from lsiq.models.loading import load
from lsiq.runtime.hydra_release import version_base

name, samples, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
conf = Path(__file__).resolve().parents[2] / "conf"
with initialize_config_dir(str(conf), **version_base()):
    config = parse(compose("config", overrides=[f"model={name}", "method=gptq", f"calib.samples={samples}"]))
AutoModelForCausalLM.from_pretrained(bundled_model(name), dtype=torch.float32).save_pretrained(folder)
AutoTokenizer.from_pretrained(bundled_model(name)).save_pretrained(folder)
model = load(config.model, bundled_model(name), torch.device("cpu"), config.seed)
tokens = calibration_tokens(config.calib, model, config.seed)
assert tokens is not None
torch.save(tokens, folder / "tokens.pt")
print(f"{folder}: {name} in float32 and {tuple(tokens.shape)} tokens, hash {token_hash(tokens)}")
