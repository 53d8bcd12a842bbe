"""Secrets are blotted out by what they are: known values, and the exact shapes of tokens; no name of a run is one."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import assert_one_line, call
from helpers.interruption import only_run
from helpers.marks import slow_but
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig

from lsiq.experiment.run import run
from lsiq.runtime.redaction import redacted

SmallRun = Callable[..., DictConfig]
LETTERS = string.ascii_letters + string.digits


def made_up(length: int) -> str:
    """Text of letters and digits that no issuer gave out."""
    return (LETTERS * 3)[:length]


TOKENS = {
    "hugging-face": f"hf_{made_up(34)}",
    "hugging-face-organisation": f"api_org_{made_up(34)}",
    **{f"github-{kind}": f"gh{kind}_{made_up(36)}" for kind in "oprsu"},
    "github-fine-grained": f"github_pat_{made_up(22)}_{made_up(59)}",
    "gitlab": f"glpat-{made_up(8)}-_{'Zz0' * 3}A",
    "openai-oldest": f"sk-{made_up(48)}",
    "openai": f"sk-{made_up(20)}T3BlbkFJ{made_up(20)}",
    "openai-project": f"sk-proj-{made_up(40)}-_{made_up(32)}T3BlbkFJ{made_up(70)}_-{made_up(2)}",
    "anthropic": f"sk-ant-api03-{made_up(60)}-_{made_up(31)}AA",
    "wandb": f"wandb_v1_{made_up(27)}_{made_up(49)}",
    "aws-key": "AKIA" + "Q3EXAMPLE7" + "ZXCVBN",
    "google": f"AIza{made_up(33)}-_",
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("around", ["{}", "error: {}: no such file", "/home/{}/x", "key={},", "'{}'", "x_{}"])
def test_a_token_is_blotted_out_wherever_it_stands(name: str, around: str) -> None:
    assert redacted(around.format(TOKENS[name])) == around.format("[secret]")


@pytest.mark.parametrize("prefix", ["hf", "sk", "ghp", "gho", "glpat", "wandb_v1", "github_pat", "AKIA", "sk-proj"])
@pytest.mark.parametrize(
    "rest",
    [
        "{}_w3a16g64_rtn_s0_0123456789",
        "{}-w3a16g64_rtn_s0_0123456789",
        "{}-Llama-2-7b_w4a8-mxint_smoothquant+rotate+lsi_s0_0123456789",
        "runs/{}_w3a16g64_rtn_s0_0123456789/record.json",
        "/home/me/{}/models/{}_llama_checkpoint_of_mine/model.safetensors",
    ],
)
def test_names_of_runs_and_folders_are_left_as_they_are(prefix: str, rest: str) -> None:
    assert redacted(rest.format(prefix, prefix)) == rest.format(prefix, prefix)


def test_forty_hexadecimal_digits_are_a_secret_where_they_are_known_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    commit, key = "9df52c7a" * 5, "0a1b2c3d" * 5
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert redacted(f"commit {commit}, key {key}") == f"commit {commit}, key [secret]"


def test_where_a_secret_lies_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setenv("SIGNING_KEY", str(tmp_path / "nothing-there"))
    assert redacted(f"{file}") == str(file)
    assert redacted(f"{tmp_path / 'nothing-there'}") == "[secret]"


@pytest.mark.parametrize("name", slow_but(["hf"], ["hf", "sk", "ghp"]))
def test_a_checkpoint_in_a_folder_called_like_a_token_is_named_everywhere(
    name: str, small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(SHAPES["llama"], tmp_path / name)
    record = run(small_run(folder, "tracker=wandb", "tracker.mode=offline"))
    kept, place = only_run(tmp_path / "runs")
    said = "".join(capsys.readouterr()).replace("\n", "")
    assert place.name.startswith(f"{name}_w")
    assert (record.run_id, kept.run_id) == (place.name, place.name)
    assert kept.config["model"]["path"] == str(folder)
    assert f"{place.name}/record.json" in said
    assert "[secret]" not in said
    told = [file.read_bytes() for file in place.rglob("*") if file.is_file()]
    assert any(place.name.encode() in content for content in told)
    assert not any(b"[secret]" in content for content in told)


def test_errors_name_such_folders(tmp_path: Path) -> None:
    done, _ = call("model.path=hf_models_of_mine_for_tests", cwd=tmp_path)
    assert_one_line(done, ["model.path=hf_models_of_mine_for_tests", "no such folder"])
