"""Whatever names a run names it in one way: by id, part of an id, folder or record file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsiq.errors import InputError
from lsiq.results.find import find_run
from lsiq.results.record import Record, write_record


def leave(runs: Path, run_id: str, status: str = "finished", quantised: bool = False) -> Path:
    record = Record(run_id, status, "2026-01-01T00:00:00", {}, 0, {}, quantised=quantised)
    return write_record(record, runs / run_id).parent


def test_every_name_of_a_run_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    folder = leave(runs, "tiny-llama_w3a16_rtn_0_abc")
    leave(runs, "tiny-llama_w4a16_rtn_0_abd")
    monkeypatch.chdir(tmp_path)
    for name in (folder.name, "w3a16", str(folder), f"{folder}/record.json", f"runs/{folder.name}"):
        record, place = find_run(Path("runs"), name)
        assert (record.run_id, place.resolve()) == (folder.name, folder.resolve()), name


def test_an_id_is_taken_before_a_part_of_another(tmp_path: Path) -> None:
    leave(tmp_path, "m_w3a16_rtn_0_ab")
    leave(tmp_path, "m_w3a16_rtn_0_abc")
    assert find_run(tmp_path, "m_w3a16_rtn_0_ab")[0].run_id == "m_w3a16_rtn_0_ab"


@pytest.mark.parametrize("key", ["", "from", "method.run"])
def test_errors_name_the_key_and_the_reason(tmp_path: Path, key: str) -> None:
    leave(tmp_path, "m_w3a16_rtn_0_abc")
    leave(tmp_path, "m_w3a16_rtn_1_abd")
    label = f"{key}=" * bool(key)
    for name, reason in {"gptq": "no such run", "w3a16": "2 runs are called so, such as m_", "": "no such run"}.items():
        with pytest.raises(InputError) as error:
            find_run(tmp_path, name, key)
        assert str(error.value).startswith(f"{label}{name}: {reason}")
        assert f"--runs {tmp_path}" in str(error.value)


def test_a_run_must_have_got_as_far_as_is_needed(tmp_path: Path) -> None:
    leave(tmp_path, "failed", "failed")
    leave(tmp_path, "blocks", "failed", quantised=True)
    for name, state in (("failed", "quantised"), ("failed", "finished"), ("blocks", "finished")):
        with pytest.raises(InputError, match=rf"from={name}: that run is failed.*run it to its end first"):
            find_run(tmp_path, name, "from", state)  # type: ignore[arg-type]
    assert find_run(tmp_path, "blocks", "from", "quantised")[1].name == "blocks"
    assert find_run(tmp_path, "failed")[1].name == "failed"


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = leave(tmp_path, "old")
    (folder / "record.json").write_text('{"schema": 0}')
    with pytest.raises(InputError, match=r"old/record\.json: not a record that this version can read"):
        find_run(tmp_path, "old")
