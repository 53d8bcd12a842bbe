"""Checkpoints are read lazily, and a damaged one is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.models import SHAPES, load_small, save_model
from safetensors.torch import load_file, save_file

from lsiq.errors import InputError
from lsiq.experiment.config import parse
from lsiq.models.folder import find_folder, fingerprint
from lsiq.models.loading import load
from lsiq.models.settings import ModelSettings

CPU = torch.device("cpu")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def open_copy(folder: Path, **changes: object) -> object:
    settings = ModelSettings(name="copy", path=str(folder), seqlen=32, **changes)
    return load(settings, find_folder(settings), CPU, seed=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_the_asked_block_is_read(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    names: list[str] = []
    read = model.checkpoint.read
    model.checkpoint.read = lambda name, shape: names.append(name) or read(name, shape)  # type: ignore[method-assign]
    model.block(1, {})
    assert names
    assert all(".layers.1." in name for name in names)


def test_shards_are_found_through_the_index(copy: Path) -> None:
    state = weights(copy)
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    model = open_copy(copy)
    assert all(weight.isfinite().all() for weight in model.block(0, {}).weights.values())  # type: ignore[attr-defined]
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard model-00002-of-00002.safetensors is missing"):
        open_copy(copy)


def test_an_index_cannot_name_a_file_outside_the_folder(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(InputError, match="outside the folder"):
        open_copy(copy)


def test_pickled_weights_are_refused_unless_asked_for(copy: Path) -> None:
    torch.save(weights(copy), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.allow_pickle=true"):
        open_copy(copy)
    model = open_copy(copy, allow_pickle=True)
    assert model.block(0, {}).weights  # type: ignore[attr-defined]


def test_pickled_code_is_never_run(copy: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("boom",))

    torch.save({"x": Bomb()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_copy(copy, allow_pickle=True)


def test_base_model_names_without_prefix_are_understood(copy: Path) -> None:
    state = {name.removeprefix("model."): tensor for name, tensor in weights(copy).items()}
    save_file(state, copy / "model.safetensors")
    assert open_copy(copy).block(0, {}).weights  # type: ignore[attr-defined]


def damage_truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def damage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def damage_missing_tensor(folder: Path) -> None:
    state = weights(folder)
    del state[next(name for name in state if "layers.1" in name and "q_proj.weight" in name)]
    save_file(state, folder / "model.safetensors")


def damage_shape(folder: Path) -> None:
    state = weights(folder)
    name = next(name for name in state if "layers.0" in name and "q_proj.weight" in name)
    state[name] = state[name][:-1].clone()
    save_file(state, folder / "model.safetensors")


def damage_nan(folder: Path) -> None:
    state = weights(folder)
    next(t for name, t in state.items() if "layers.1" in name and "v_proj.weight" in name)[0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")


def damage_integers(folder: Path) -> None:
    state = weights(folder)
    name = next(name for name in state if "layers.0" in name and "k_proj.weight" in name)
    state[name] = state[name].to(torch.int8)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "cannot be read"),
        (damage_header, "cannot be read"),
        (damage_missing_tensor, "has no tensor .*q_proj.weight"),
        (damage_shape, "config.json asks for"),
        (damage_nan, "not finite"),
        (damage_integers, "not a float weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(copy: Path, damage: object, message: str) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        read_all(copy)


def read_all(folder: Path) -> None:
    model = open_copy(folder)
    for index in range(2):
        model.block(index, {})  # type: ignore[attr-defined]


def test_an_unknown_family_is_refused_with_the_known_ones(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(InputError, match="model_type=mamba is not supported; there are llama"):
        open_copy(copy)


def test_the_fingerprint_follows_the_weights(copy: Path) -> None:
    before = fingerprint(copy, False)
    state = weights(copy)
    next(iter(state.values())).view(-1)[0] += 1.0
    save_file(state, copy / "model.safetensors")
    assert fingerprint(copy, False) != before


def test_random_weights_have_the_true_shape_without_a_download() -> None:
    config = parse(compose_run("model=opt-125m", "model.weights=random"))
    model = load(config.model, find_folder(config.model), CPU, seed=0)
    assert model.depth == 12
    block = model.block(3, {})
    assert block.weights["fc1.weight"].shape == (3072, 768)
    assert torch.equal(block.weights["fc1.weight"], model.block(3, {}).weights["fc1.weight"])
    assert not torch.equal(block.weights["fc1.weight"], model.block(4, {}).weights["fc1.weight"])


def test_opt_350m_loads_and_says_why_it_cannot_be_folded(tmp_path: Path) -> None:
    shape = SHAPES["opt"] | {"do_layer_norm_before": False, "word_embed_proj_dim": 48}
    model = load_small(save_model(shape, tmp_path / "opt-350m-like"))
    hidden, kwargs = model.embed(torch.zeros(1, 8, dtype=torch.long), 1)
    for index in range(model.depth):
        hidden = model.block(index, kwargs).with_weights({})(hidden)
    assert model.logits(hidden).shape == (1, 8, 4096)
    assert "post-norm" in (model.spec.why_not_foldable(model.config) or "")


@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "llama", "tie_word_embeddings": True},
    ],
    ids=lambda shape: "-".join(str(value) for value in shape.values()),
)
def test_every_family_equals_its_plain_forward(shape: dict[str, object], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(SHAPES["llama"] | shape, tmp_path / "model")
    model = load_small(folder)
    tokens = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = model.embed(tokens, batch=1)
    for index in range(model.depth):
        hidden = model.block(index, kwargs).with_weights({})(hidden)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens, use_cache=False).logits
    assert torch.allclose(model.logits(hidden), expected, atol=1e-5, rtol=1e-5)
