"""Packages without bytecode: told of where every run would compile them, and nowhere else."""

from __future__ import annotations

import py_compile
import sys
from pathlib import Path

import pytest

from lsiq.runtime.bytecode import missing_bytecode


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package `large` that is not imported yet and has no bytecode."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path / "large"


def test_what_python_keeps_by_itself_is_not_told_of(package: Path) -> None:
    assert missing_bytecode("large") is None


def test_bytecode_that_is_never_written_is_missed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    advice = missing_bytecode("sys", "large") or ""
    assert advice.endswith(f"(PYTHONDONTWRITEBYTECODE); once: python -m compileall -q -j 0 {package.parent}")
    py_compile.compile(str(package / "__init__.py"))  # as compileall does, whatever Python is told
    assert missing_bytecode("large") is None


def test_a_folder_that_cannot_be_written_to_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != package)
    assert f"{package} has no bytecode, and cannot be written to; set PYTHONPYCACHEPREFIX" in (
        missing_bytecode("large") or ""
    )
