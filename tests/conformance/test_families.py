"""Every family: its blocks in turn are the plain model, and what is folded or rotated leaves it so."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES
from helpers.hosts import Seen, hosts, quantised, seeded
from helpers.models import SHAPES, load_small, save_model
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from lsiq.errors import InputError
from lsiq.evals.perplexity import perplexity
from lsiq.experiment.run import run
from lsiq.formats.activation import Activation
from lsiq.methods.rotate import Rotate
from lsiq.methods.rtn import RTN
from lsiq.models.attention import activations, attend
from lsiq.models.block import Block
from lsiq.models.families import families, find_spec
from lsiq.models.folding import channels_of, fold_scale
from lsiq.models.loading import Model
from lsiq.models.outliers import PlantedOutliers

OLMO, PHI, SANDWICH = "olmo2", "phi3", ("gemma2", "gemma3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_model(shape, root / name) for name, shape in {**SHAPES, **FAMILIES}.items()}


@pytest.fixture(params=sorted({**SHAPES, **FAMILIES}))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@functools.cache
def loaded(folder: Path) -> Model:
    """Of each family, read once: a model changes nothing in itself, and reads its blocks anew each time."""
    return load_small(folder)


def some_tokens(count: int = 2, length: int = 48) -> Tensor:
    return torch.randint(3, 4096, (count, length), generator=torch.Generator().manual_seed(0))


def logits(model: Model, tokens: Tensor) -> Tensor:
    hidden, kwargs = model.embed(tokens, batch=1)
    for index in range(model.depth):
        hidden = model.block(index, kwargs).with_weights({})(hidden)
    return model.logits(hidden)


@torch.no_grad()
def plain_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Of transformers' own model with its own plain attention."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return plain(tokens, use_cache=False).logits


def test_blocks_in_turn_are_the_plain_model(folder: Path) -> None:
    tokens = some_tokens()
    found = logits(loaded(folder), tokens)
    assert torch.allclose(found, plain_logits(folder, tokens), atol=1e-5, rtol=1e-5)  # measured: at most 2.5e-6


def test_streamed_perplexity_is_that_of_the_plain_model(folder: Path) -> None:
    tokens = some_tokens(4)
    model = loaded(folder)
    found = perplexity(model, tokens, 2, lambda block: block.with_weights({}), lambda: None)
    scores = plain_logits(folder, tokens)[:, :-1].log_softmax(-1)
    expected = -scores.gather(2, tokens[:, 1:, None]).double().mean().item()
    assert abs(found.loss - expected) < 1e-5  # measured: at most 3e-7


def test_a_window_hides_what_is_far(folders: dict[str, Path]) -> None:
    for name, window in (("gemma2", 16), ("phi3", 20)):
        block, hidden = block_and_stream(loaded(folders[name]), 0)
        changed = hidden.clone()
        changed[:, 0] = 0
        moved = (block.with_weights({})(changed) - block.with_weights({})(hidden)).abs().amax((0, 2))
        assert (moved[:window] > 0).all()
        assert (moved[window:] == 0).all(), name


def test_blocks_of_other_kinds_are_other_functions(folders: dict[str, Path]) -> None:
    for name in ("smollm3", "gemma2", "gemma3", "qwen3-windows"):
        model = loaded(folders[name])
        identities = [model.block(index, {}).identity for index in range(model.depth)]
        assert identities[0] != identities[-1], name
    alike = loaded(folders["llama-3.2"])
    assert alike.block(0, {}).identity == alike.block(1, {}).identity


def block_and_stream(model: Model, index: int) -> tuple[Block, Tensor]:
    hidden, kwargs = model.embed(some_tokens(), batch=2)
    return model.block(index, kwargs), hidden


def test_folds_keep_the_function_of_a_block(folder: Path) -> None:
    model = loaded(folder)
    for index in range(model.depth):
        block, hidden = block_and_stream(model, index)
        expected = block.with_weights({})(hidden)
        for group in block.groups:
            scale = torch.rand(channels_of(block.weights, group), generator=torch.Generator().manual_seed(1)) * 3 + 0.3
            changed = fold_scale(block.weights, group, scale, block.head_dim)
            found = block.with_weights(changed)(hidden)
            assert torch.allclose(found, expected, atol=1e-4), group  # measured: at most 4e-6


def test_a_fold_changes_the_rows_of_the_group_alone(folders: dict[str, Path]) -> None:
    block, _ = block_and_stream(loaded(folders[PHI]), 0)
    value, up = (group for group in block.groups if group.fused)
    assert channels_of(block.weights, value) == 2 * 16
    assert channels_of(block.weights, up) == 96
    for group in (value, up):
        scale = torch.full((channels_of(block.weights, group),), 2.0)
        name = f"{group.producer}.weight"
        changed = (fold_scale(block.weights, group, scale, 16)[name] != block.weights[name]).any(1)
        assert not changed[: -len(scale)].any()
        assert changed[-len(scale) :].all()


def test_planted_outliers_leave_the_model_as_it_was(folder: Path) -> None:
    model, tokens = loaded(folder), some_tokens()
    planted = replace(model, planting=PlantedOutliers(2, 30.0))
    assert torch.allclose(logits(planted, tokens), logits(model, tokens), atol=1e-4)  # measured: at most 5e-6


def rotated(model: Model, places: list[str]) -> Model:
    return Rotate(places=places, then=RTN()).prepare_model(model, None, 2, torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_a_turned_residual_stream_leaves_the_model_as_it_was_or_is_refused(folder: Path) -> None:
    model, tokens = loaded(folder), some_tokens()
    if folder.name in (OLMO, *SANDWICH):
        with pytest.raises(InputError, match="post-norm" if folder.name == OLMO else "sandwich norms"):
            rotated(model, ["residual"])
    else:
        found = logits(rotated(model, ["residual"]), tokens)
        assert torch.allclose(found, logits(model, tokens), atol=1e-4)  # measured: at most 4e-6
        trained = Rotate(places=["residual"], steps=3, then=RTN()).prepare_model(model, tokens, 2, seeded())
        assert torch.allclose(logits(trained, tokens), found, atol=1e-4)
        assert not torch.allclose(trained.residual, rotated(model, ["residual"]).residual, atol=1e-3)


@pytest.mark.parametrize("host", ["value", "all", "duquant", "smoothed", "rotated-smoothed"])
def test_a_host_hands_on_a_block_with_the_same_float_function(folder: Path, host: str) -> None:
    block, hidden = block_and_stream(loaded(folder), 1)
    seen = Seen()
    if folder.name == OLMO and "smoothed" in host:
        with pytest.raises(InputError, match="post-norm"):
            quantised(hosts(seen)[host], block, hidden)
        return
    quantised(hosts(seen)[host], block, hidden)
    found, expected = seen.block.with_weights({})(hidden), block.with_weights({})(hidden)
    assert torch.allclose(found, expected, atol=1e-4)  # measured: at most 3e-6
    assert not all(torch.equal(seen.block.weights[name], block.weights[name]) for name in block.linears)


def test_a_prefix_is_the_plain_model_on_longer_sequences(folder: Path) -> None:
    model, tokens, prefix = loaded(folder), some_tokens(length=29), torch.tensor([5, 900, 7])
    expected = plain_logits(folder, torch.cat([prefix.expand(2, -1), tokens], 1))[:, 3:]
    assert torch.allclose(logits(model.with_prefix(prefix), tokens), expected, atol=1e-4)  # measured: at most 4e-6


def test_a_prefix_is_refused_where_its_keys_would_depend_on_what_follows(folders: dict[str, Path]) -> None:
    model = loaded(folders["phi4-mini"]).with_prefix(torch.tensor([5, 900, 7]))
    with pytest.raises(InputError, match="rotary embedding of a prefix of 3 tokens changes"):
        model.embed(some_tokens(length=30), 2)


def test_capped_scores_stay_capped_while_they_are_quantised(folders: dict[str, Path]) -> None:
    block, _ = block_and_stream(loaded(folders["gemma2"]), 1)
    attention = block.module.get_submodule("self_attn")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 8, 24, generator=generator) * 3
    key, value = (torch.randn(2, 2, 8, 24, generator=generator) for _ in range(2))
    for fmt in (Activation(bits=4), Activation(bits=4, softmax=True)):
        with activations(block.module, block.spec.linears, fmt):
            found, _ = attend(attention, query, key, value, None, scaling=0.3, softcap=2.0)
        q, k, v = fmt.fake(query), *(fmt.fake(x).repeat_interleave(2, 1) for x in (key, value))
        scores = 2 * (q @ k.transpose(2, 3) * 0.3 / 2).tanh()
        weights = scores.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        weights = fmt.fake_softmax(weights) if fmt.softmax else weights
        assert torch.allclose(found.transpose(1, 2), weights @ v, atol=1e-6)


def test_gradients_reach_every_weight(folder: Path) -> None:
    block, hidden = block_and_stream(loaded(folder), 1)
    weights = {name: block.weights[name].clone().requires_grad_() for name in block.linears}
    block.with_weights(weights)(hidden).square().mean().backward()
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in weights.values())


def test_every_linear_of_the_layer_is_listed(folder: Path) -> None:
    block, _ = block_and_stream(loaded(folder), 0)
    linears = [f"{name}.weight" for name, m in block.module.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(block.linears) == sorted(linears)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "a mixture of experts"),
        ({"model_type": "jamba", "attn_layer_period": 8}, "a hybrid"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0, "mamba_d_state": 128}, "a hybrid"),
        ({"model_type": "mamba", "state_size": 16}, "a state-space model"),
        ({"model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model"}}, "multimodal"),
        ({"model_type": "gemma3n_text", "hidden_size_per_layer_input": 256}, "a model with embeddings in every block"),
        ({"model_type": "llava", "vision_config": {"image_size": 336}}, "multimodal"),
        ({"model_type": "llama4", "vision_config": {"image_size": 336}}, "multimodal"),
        ({"model_type": "llama4_text", "num_local_experts": 16}, "a mixture of experts"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_other_kinds_of_models_are_refused_in_one_line(
    config: dict[str, object], kind: str, folders: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["smollm2"], tmp_path / "model")
    (copy / "config.json").write_text(json.dumps(config))
    for action in (lambda: load_small(copy), lambda: run(small_run(copy))):
        with pytest.raises(
            InputError, match=f"model_type={config['model_type']} is not supported, for it is {kind}"
        ) as why:
            action()
        assert "\n" not in str(why.value)


def test_a_family_with_strange_blocks_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["smollm3"] / "config.json").read_text())
    config["layer_types"] = ["full_attention", "chunked_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"of the kind chunked_attention"):
        load_small(tmp_path)


def test_every_family_is_found_by_its_name() -> None:
    assert all(find_spec(name, "here").model_type == name for name in families())
    assert {shape["model_type"] for shape in {**SHAPES, **FAMILIES}.values()} <= set(families())


@pytest.mark.parametrize("method", ["omniquant", "prefix"])
def test_a_run_of_a_model_with_windows_and_caps(
    method: str, folders: dict[str, Path], small_run: Callable[..., DictConfig]
) -> None:
    overrides = ["method.training.epochs=1"] if method == "omniquant" else []
    record = run(small_run(folders["gemma2"], f"method={method}", "quant=w4a4", "quant.weight.group=null", *overrides))
    assert record.status == "finished"
    key = "ppl/file@64"
    assert record.metrics[f"float/{key}"] != record.metrics[key]
    assert 0.5 < record.metrics[key] / record.metrics[f"float/{key}"] < 2


def test_scales_are_refused_where_only_learning_would_fold_them(
    folders: dict[str, Path], small_run: Callable[..., DictConfig]
) -> None:
    with pytest.raises(InputError, match="the part equivalent folds scales into norms, but its blocks have no norms"):
        run(small_run(folders["olmo2"], "method=omniquant", "quant=w4a4", "quant.weight.group=null"))
