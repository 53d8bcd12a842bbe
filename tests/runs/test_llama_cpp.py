"""llama.cpp itself reads what is exported: its logits, perplexity and tokens are those of the run.

Wants the package llama-cpp-python, which is built from source; without it everything here is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_files import READ_ALONE, SHAPES_OF_FILES, TEXT, write_gguf
from helpers.models import save_model
from omegaconf import DictConfig

from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.experiment.run import run
from lsiq.models.gguf_tokenizer import read_tokenizer
from lsiq.models.loading import load
from lsiq.models.settings import ModelSettings
from lsiq.models.splitters import SPLITTERS

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

SmallRun = Callable[..., DictConfig]
GELU = {"gemma2", "gemma3"}  # which llama.cpp reads from a table of float16
SEQLEN = 64
DENSE = ("quant=w4a16", "quant.weight.group=32", "quant.weight.scale=float16", "calib=none", "export=gguf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_model(shape, root / family) for family, shape in SHAPES_OF_FILES.items()}


@contextmanager
def opened(file: Path, **settings: Any) -> Iterator[Any]:
    """llama.cpp with the file, keys and values in float32, and closed again."""
    wide = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(file), n_ctx=SEQLEN, n_threads=1, verbose=False, **wide, **settings)
    try:
        yield model
    finally:
        model.close()


@pytest.mark.parametrize("kind", ["F32", "auto"])
@pytest.mark.parametrize("family", SHAPES_OF_FILES)
def test_logits_perplexity_and_tokens_are_those_of_the_run(
    family: str, kind: str, folders: dict[str, Path], text_file: Path, small_run: SmallRun
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = run(small_run(folders[family], *DENSE, f"export.type={kind}"))
    folder = Path(record.exports["gguf"]["folder"])
    corpus = read_corpus("file", "evaluation", str(text_file))
    windows = cut_windows(corpus, AutoTokenizer.from_pretrained(folders[family]), SEQLEN, "file")
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    with opened(folder / "model.gguf", logits_all=True) as model, torch.no_grad():
        tokens = model.tokenize(corpus.joined().encode(), add_bos=False)
        logits = torch.stack([logits_of(model, window) for window in windows])
        difference = (logits - reference(windows).logits).abs().max().item()
    assert tokens[: windows.numel()] == windows.flatten().tolist()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    off = losses.exp().item() / record.metrics[f"ppl/file@{SEQLEN}"] - 1
    if kind == "F32":
        assert difference < (1e-2 if family in GELU else 1e-4)  # measured: at most 3.1e-3, 5.5e-6; logits reach 4
        assert abs(off) < 1e-4  # measured: at most 1.3e-5
    else:  # llama.cpp's kernels round what enters a linear to 8 bits in blocks of 32
        assert difference < 0.5  # measured: 0.06 to 0.12
        assert abs(off) < 1e-2  # measured: at most 1.0e-3


@pytest.mark.parametrize("family", READ_ALONE)
def test_a_file_that_is_read_alone_is_the_same_model_to_llama_cpp(family: str, tmp_path: Path) -> None:
    folder = save_model(READ_ALONE[family], tmp_path / family)
    path = write_gguf(folder, tmp_path / "m.gguf", "F32")
    settings = ModelSettings(name="file", path=str(path), seqlen=SEQLEN)
    ours = load(settings, path, torch.device("cpu"), seed=0)
    tokens = torch.randint(4096, (1, SEQLEN), generator=torch.Generator().manual_seed(0))
    with opened(path, logits_all=True) as model, torch.no_grad():
        hidden, kwargs = ours.embed(tokens, 1)
        for index in range(ours.depth):
            hidden = ours.block(index, kwargs).with_weights({})(hidden)
        difference = (ours.logits(hidden)[0] - logits_of(model, tokens[0])).abs().max().item()
    assert difference < 1e-4  # measured: at most 2.9e-6


def logits_of(model: Any, window: torch.Tensor) -> torch.Tensor:
    model.reset()
    model.eval(window.tolist())
    return torch.from_numpy(np.array(model.scores[: len(window)]))


@pytest.mark.parametrize("name", SPLITTERS)
def test_words_are_split_as_llama_cpp_splits_them(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_gguf(folders["llama"], tmp_path / "m.gguf", "F16", splitter=name)
    tokenizer = read_tokenizer(path)
    with opened(path, vocab_only=True) as model:
        assert model.tokenize(TEXT.encode(), add_bos=False) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        begins = model.tokenize(b"boat", add_bos=True)[0] == tokenizer.bos_token_id
    assert begins == (tokenizer("boat")["input_ids"][0] == tokenizer.bos_token_id)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"])
def test_pieces_of_sentencepiece_are_joined_as_the_tokenizer_joins_them(
    family: str, folders: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    pieces = ["▁", *"aboth", "▁b", "oa", "▁boa", "▁boat", "▁▁"]
    path = write_gguf(folders[family], tmp_path / "m.gguf", "F32", pieces=pieces)
    record = run(small_run(path, *DENSE, "eval=none", "export.verify=false"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    with opened(Path(record.exports["gguf"]["folder"]) / "model.gguf", vocab_only=True) as model:
        texts = ("a boat 7", "a  boat", "the boat hat")
        # Behind a special token llama.cpp puts a blank before LLaMA's words, transformers does not.
        for text in texts if family == "llama" else (*texts, "boat<eos>b"):
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert model.tokenize(text.encode(), add_bos=False, special=True) == wanted, text
