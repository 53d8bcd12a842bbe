"""What the picture of a plan says of each linear."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsiq.allocation.figure import draw_plan, labels_of
from lsiq.allocation.plan import Plan
from lsiq.formats.names import named_format


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("w2g128", "w4g128", "float"), ["2", "4", "16"]),
        (("w4g128", "nvfp4"), ["w4g128", "w4-nvfp4"]),
    ],
    ids=["bits-tell", "bits-do-not"],
)
def test_a_cell_says_bits_where_they_tell_formats_apart(names: tuple[str, ...], labels: list[str]) -> None:
    assert list(labels_of(map(named_format, names)).values()) == labels


def test_formats_of_equal_bits_are_named_in_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = Plan({"0.self_attn.q_proj": "w4g128", "1.self_attn.q_proj": "mxfp4"}, average_bits=4.2)
    file = draw_plan(plan, 2, ["self_attn.q_proj"], tmp_path)
    assert file is not None
    text = file.read_text(encoding="utf-8")
    assert "<!-- w4g128 -->" in text
    assert "<!-- w4-mxfp4 -->" in text
