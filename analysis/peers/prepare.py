"""Write what a public package gets: a model in float32 and the calibration tokens that a run of ours draws.

python analysis/peers/prepare.py DIR model=tiny-llama calib.samples=64          overrides as run.py takes them
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from lsiq.data.tokens import token_hash
from lsiq.experiment.calibrate import calibration_tokens
from lsiq.experiment.config import parse
from lsiq.models.folder import find_folder
from lsiq.models.loading import load
from lsiq.runtime.hydra_entry import version_base

folder, overrides = Path(sys.argv[1]), sys.argv[2:]
conf = Path(__file__).resolve().parents[2] / "conf"
with initialize_config_dir(str(conf), **version_base()):
    config = parse(compose("config", overrides=["method=gptq", *overrides]))
checkpoint = find_folder(config.model)
assert checkpoint is not None
place, file = (checkpoint.parent, {"gguf_file": checkpoint.name}) if checkpoint.is_file() else (checkpoint, {})
theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file)
if file:  # what is read from GGUF is float now, but takes itself for quantised
    state, config_of = theirs.state_dict(), theirs.config
    del config_of.quantization_config
    theirs = AutoModelForCausalLM.from_config(config_of, dtype=torch.float32)
    theirs.load_state_dict(state)
theirs.save_pretrained(folder)
model = load(config.model, checkpoint, torch.device("cpu"), config.seed)
model.tokenizer.save_pretrained(folder)
tokens = calibration_tokens(config.calib, model, config.seed)
assert tokens is not None
torch.save(tokens, folder / "tokens.pt")
print(f"{folder}: {config.model.name} in float32 and {tuple(tokens.shape)} tokens, hash {token_hash(tokens)}")
