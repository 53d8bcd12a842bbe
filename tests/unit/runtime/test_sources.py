"""What was computed once is taken up only while its code is the same; folders say which code that is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lsiq.experiment.evaluate import REFERENCES
from lsiq.experiment.stamp import DECIDES_BLOCKS, DECIDES_NO_BLOCK
from lsiq.runtime import sources
from lsiq.runtime.sources import rooms, source_hash


def test_every_folder_decides_blocks_or_does_not() -> None:
    assert sorted([*DECIDES_BLOCKS, *DECIDES_NO_BLOCK]) == rooms()


def test_what_scores_references_is_in_the_package() -> None:
    assert set(REFERENCES) <= set(rooms())
    with pytest.raises(FileNotFoundError):
        source_hash("evaluation")


def test_a_change_of_a_table_leaves_blocks_as_they_are_and_one_of_the_loop_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "lsiq"
    shutil.copytree(Path(sources.__file__).parent.parent, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.xz"))
    monkeypatch.setattr(sources, "_PACKAGE", copy)
    before = source_hash(*DECIDES_BLOCKS)
    with (copy / "tables" / "table.py").open("a") as file:
        file.write("# changed\n")
    with (copy / "experiment" / "quantize.py").open("a") as file:
        file.write("# changed\n")
    assert source_hash(*DECIDES_BLOCKS) == before
    with (copy / "pipeline" / "prepare.py").open("a") as file:
        file.write("# changed\n")
    assert source_hash(*DECIDES_BLOCKS) != before
