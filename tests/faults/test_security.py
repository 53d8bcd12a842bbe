"""What others wrote, configurations and checkpoints, cannot run code, write elsewhere or make a wrong number."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import assert_one_line, call
from helpers.configuration import compose_run
from helpers.interruption import acts, only_run
from helpers.models import load_small
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lsiq.cli.hydra_guard import check_hydra, guarded
from lsiq.cli.messages import explain_hydra
from lsiq.errors import ConfigError, InputError, LsiqError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.identity import run_id
from lsiq.experiment.run import run
from lsiq.models.folder import weight_files
from lsiq.models.loading import load
from lsiq.models.settings import ModelSettings
from lsiq.results.record import read_record
from lsiq.results.store import BlockStore
from lsiq.runtime.files import read_tensors, write_tensors
from lsiq.runtime.redaction import redacted
from lsiq.settings import find_target

SmallRun = Callable[..., DictConfig]
# Few numbers in the everyday suite; the many are tried with -m faults.
NUMBERS = [pytest.param(20, id="few"), pytest.param(2000, id="many", marks=pytest.mark.faults)]


def fuzz(check: Callable[..., None], examples: int, *strategies: st.SearchStrategy[Any]) -> None:
    options = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(*strategies)(check))()


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_pickled_checkpoint_runs_no_code_asked_for_or_not(
    checkpoints: dict[str, Path], tmp_path: Path, allowed: bool
) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil(tmp_path / "mark")}))
    choice = ModelSettings(name="x", path=str(folder), seqlen=64, allow_pickle=allowed)
    with pytest.raises(InputError, match="cannot be read" if allowed else r"pickled .* set model\.allow_pickle=true"):
        load(choice, folder, torch.device("cpu"), 0)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_checkpoint_is_never_run(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})\nclass Evil: pass\n")
    values = json.loads((folder / file).read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    values["auto_map"] = {name: ["evil.Evil", "evil.Evil"] if "Tok" in name else "evil.Evil" for name in names}
    (folder / file).write_text(json.dumps(values))
    monkeypatch.chdir(folder)
    load(ModelSettings(name="x", path=str(folder), seqlen=64), folder, torch.device("cpu"), 0)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "sub/../../x", "..", ".", "", 3, None, ["a"], {"a": 1}]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name, "v": "x"}}))
    with pytest.raises(InputError, match=r"outside the folder|is missing"):
        weight_files(tmp_path, False)


CALLS = {
    "callback": "+hydra.callbacks.x._target_=os.getcwd",
    "logging-class": "+hydra.hydra_logging.handlers.x.class=logging.handlers.SocketHandler",
    "logging-file": "+hydra.job_logging.handlers.x={class:logging.FileHandler,filename:/tmp/x}",
    "logging-object": "+hydra.job_logging.formatters.x.format=ext://os.environ",
}


@pytest.mark.parametrize("name", CALLS)
def test_hydras_own_node_can_call_nothing(name: str) -> None:
    with guarded(), pytest.raises(ConfigError, match=r"hydra\.(callbacks|job_logging|hydra_logging)"):
        compose_run(CALLS[name])


def test_a_logging_factory_can_call_nothing() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.job_logging: \(\)=os\.getcwd"):
        check_hydra(OmegaConf.create({"hydra": {"job_logging": {"handlers": {"x": {"()": "os.getcwd"}}}}}))


def test_the_command_line_is_guarded(tmp_path: Path) -> None:
    done, _ = call("+hydra.callbacks.x._target_=pathlib.Path", "+hydra.callbacks.x._args_=[x]", cwd=tmp_path)
    assert_one_line(done, ["hydra.callbacks", "leave it out"])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "lsiq.experiment.run.run",
        "lsiq.settings.importlib.import_module",
        "lsiq.results.store.BlockStore",
        "lsiq.results.store.DictConfig",
        "lsiq.experiment.config.OmegaConf",
        "lsiq..os.system",
        "lsiq.",
        "lsiq.experiment.config.__builtins__",
        "lsiq.methods.rtn.RTN.name",
        7,
        None,
    ],
)
def test_only_settings_of_the_package_are_built(target: Any) -> None:
    with pytest.raises(ConfigError):
        find_target(target, "method")


def test_secrets_reach_neither_record_nor_terminal(
    checkpoints: dict[str, Path],
    small_run: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"of-{name}-0123456789")
    (tmp_path / "token").write_text("of-file-0123456789\n")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password of-netrc-0123456789\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("os.path.expanduser", lambda path: str(path).replace("~", str(tmp_path)))
    (tmp_path / ".netrc").write_text((tmp_path / "netrc").read_text())
    (tmp_path / ".netrc").chmod(0o600)
    tags = [
        "'${oc.env:WANDB_API_KEY}'",
        "'x ${oc.env:HF_TOKEN} y'",
        "'${oc.env:AWS_SECRET_ACCESS_KEY}'",
        "'${oc.env:MY_PASSWORD}'",
        "of-file-0123456789",
        "of-netrc-0123456789",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "'https://user:pass-of-mine@host/x'",
    ]
    run(small_run(checkpoints["llama"], "tracker=wandb", "tracker.mode=disabled", f"tracker.tags=[{','.join(tags)}]"))
    with pytest.raises(LsiqError):
        run(small_run(checkpoints["llama"], "model.path='/nowhere/${oc.env:HF_TOKEN}'"))
    record, folder = only_run(tmp_path / "runs")
    assert record.config["tracker"]["tags"][1] == "x [secret] y"
    written = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    said = "".join(capsys.readouterr())
    for secret in ("0123456789", "hf_abc", "pass-of-mine"):
        assert secret.encode() not in written
        assert secret not in said
    assert redacted("error: HF_TOKEN of-HF_TOKEN-0123456789") == "error: HF_TOKEN [secret]"


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["../../x", "/etc/passwd", "a/b", "~", "x\x00y", "\n", "${seed}", "${oc.env:HOME}", "${a", "??"]),
    st.sampled_from(["os.system", "lsiq.methods.rtn.RTN", "lsiq.experiment.run.run"]).map(
        lambda name: {"_target_": name}
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
)


def places(node: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something could stand otherwise in plain data."""
    found = [before] if before else []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        found += places(value, (*before, key))
    return found


def put(node: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value


METHODS = ("lsi", "rtn", "gptq", "best", "prefix", "qera-exact", "e2e")


@pytest.mark.parametrize("examples", NUMBERS)
def test_any_configuration_is_settings_or_one_line_and_does_nothing(examples: int) -> None:
    bases = [
        plain_config(compose_run(f"method={name}", *(["method.run=x"] if name == "e2e" else []))) for name in METHODS
    ]
    all_places = [[*places(base), ("new",), ("method", "new"), ("quant", "weight", "new")] for base in bases]

    def check(which: int, changes: list[tuple[int, Any]]) -> None:
        plain = copy.deepcopy(bases[which])
        for number, junk in changes:
            try:
                put(plain, all_places[which][number % len(all_places[which])], junk)
            except (TypeError, IndexError, KeyError):
                continue  # an earlier change took the place away
        name = "refused"
        with acts() as done, contextlib.suppress(LsiqError, OmegaConfBaseException):
            name = run_id(parse(OmegaConf.create(plain)), plain, {})
        assert done == []
        assert Path(name).name == name
        assert name not in (".", "..")

    changes = st.lists(st.tuples(st.integers(0, 10**6), JUNK), min_size=1, max_size=3)
    fuzz(check, examples, st.integers(0, len(METHODS) - 1), changes)


@pytest.mark.parametrize("examples", [NUMBERS[0], pytest.param(500, id="many", marks=pytest.mark.faults)])
def test_any_override_is_answered_in_one_line(examples: int) -> None:
    keys = st.sampled_from(
        ["seed", "quant", "method.training.epochs", "+x", "~calib", "paths.runs", "a@b", "++hydra.x"]
    )

    def check(key: str, value: str) -> None:
        message = "none"
        with acts() as done:
            try:
                parse(compose_run(f"{key}={value}"))
            except (HydraException, OmegaConfBaseException) as error:
                message = explain_hydra(error, {})
            except LsiqError as error:
                message = str(error)
            except ValueError as error:  # answered by `reporting` as well
                message = "none" if "Config group override" in str(error) else ""
        assert done == []
        assert message

    values = st.text(max_size=20) | st.sampled_from(["[", "{a:", "${x}", "'", "a=b", "null", "${oc.env:HOME}", "1e999"])
    fuzz(check, examples, keys, values)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes flipped, cut off or put in, anywhere."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    at = draw(st.floats(0, 1, exclude_max=True))
    early = draw(st.booleans())  # headers are short and decide most
    junk = draw(st.binary(min_size=1, max_size=8))

    def apply(content: bytes) -> bytes:
        place = int(at * min(len(content), 600 if early else len(content)))
        if kind == "cut":
            return content[:place]
        if kind == "insert":
            return content[:place] + junk + content[place:]
        changed = bytearray(content)
        span = changed[place : place + len(junk)]
        new = bytes(len(span)) if kind == "zero" else bytes(a ^ b for a, b in zip(span, junk, strict=False))
        changed[place : place + len(junk)] = new
        return bytes(changed)

    return apply


@pytest.mark.parametrize("examples", NUMBERS)
def test_a_damaged_block_is_never_read_as_a_block(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, examples: int
) -> None:
    run(small_run(checkpoints["llama"], "eval=none"))
    _, folder = only_run(tmp_path / "runs")
    store = BlockStore(folder / "blocks")
    file = folder / "blocks" / "block_001.safetensors"
    content = file.read_bytes()

    def check(apply: Callable[[bytes], bytes]) -> None:
        changed = apply(content)
        file.write_bytes(changed)
        if changed == content:
            store.read(1)
            return
        with pytest.raises(InputError, match=r"block_001\.safetensors is damaged"):
            store.read(1)

    fuzz(check, examples, damage())


@pytest.mark.parametrize("target", ["lsiq.runtime.settings.PathSettings", "os.system", "lsiq.methods.rtn.RTN"])
def test_a_block_with_a_fitting_checksum_builds_number_formats_only(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, target: str
) -> None:
    run(small_run(checkpoints["llama"], "eval=none"))
    _, folder = only_run(tmp_path / "runs")
    file = folder / "blocks" / "block_001.safetensors"
    stored = read_tensors(file)
    formats = {name: {"_target_": target} for name in json.loads(stored.metadata["formats"])}
    write_tensors(file, stored.tensors, {**stored.metadata, "formats": json.dumps(formats)})
    with pytest.raises(InputError, match="does not hold a block"):
        BlockStore(folder / "blocks").read(1)


@pytest.mark.parametrize("examples", NUMBERS)
def test_a_damaged_record_is_a_record_or_none(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, examples: int
) -> None:
    run(small_run(checkpoints["llama"], "eval=none"))
    _, folder = only_run(tmp_path / "runs")
    content = (folder / "record.json").read_bytes()

    def check(apply: Callable[[bytes], bytes]) -> None:
        (folder / "record.json").write_bytes(apply(content))
        read_record(folder)

    fuzz(check, examples, damage())


@pytest.mark.parametrize("examples", [NUMBERS[0], pytest.param(1000, id="many", marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_a_damaged_checkpoint_is_one_line_and_does_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, examples: int, file: str
) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    if file.endswith("index.json"):
        names = ["model.norm.weight", "lm_head.weight"]
        (folder / file).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    content = (folder / file).read_bytes()
    choice = ModelSettings(name="x", path=str(folder), seqlen=64)
    load_small(folder)

    def check(apply: Callable[[bytes], bytes]) -> None:
        (folder / file).write_bytes(apply(content))
        with acts() as done, contextlib.suppress(LsiqError):
            model = load(choice, folder, torch.device("cpu"), 0)
            for index in range(min(model.depth, 3)):
                model.block(index, {})
        assert done == []

    fuzz(check, examples, damage())
