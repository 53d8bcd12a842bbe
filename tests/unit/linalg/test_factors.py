"""Factors found once are found again, and whatever is wrong with the folder costs time only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lsiq.linalg.svd
from lsiq.linalg.svd import decompose, factors


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))


def refuse(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise AssertionError("decomposed again")


def test_the_second_run_reads_what_the_first_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = factors(weight(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, decompose(weight()), strict=True))
    monkeypatch.setattr(lsiq.linalg.svd, "decompose", refuse)
    assert all(torch.equal(a, b) for a, b in zip(first, factors(weight(), tmp_path), strict=True))
    with pytest.raises(AssertionError, match="again"):
        factors(weight(1), tmp_path)
    with pytest.raises(AssertionError, match="again"):
        factors(weight(), None)


def test_factors_lie_in_memory_alike_wherever_they_come_from(tmp_path: Path) -> None:
    """Products of the same numbers differ in the last bit where their rows lie apart, and signed steps magnify that."""
    made, read, alone = factors(weight(), tmp_path), factors(weight(), tmp_path), factors(weight(), None)
    assert [t.stride() for t in made] == [t.stride() for t in read] == [t.stride() for t in alone]


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    first = factors(weight(), tmp_path)
    (file,) = (tmp_path / "factors").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert all(torch.equal(a, b) for a, b in zip(first, factors(weight(), tmp_path), strict=True))
    assert file.stat().st_size > 100


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "factors").write_text("a file in the way")
    factors(weight(), tmp_path)
    assert "paths.cache" in capsys.readouterr().err
