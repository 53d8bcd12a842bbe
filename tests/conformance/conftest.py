"""The models that every method is tested on: LLaMA and OPT always, the other families with one method each.

The whole product of families and methods runs under the marker `slow`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SHAPES, save_model
from families import FAMILIES

# The method that stands for all on the families beside LLaMA and OPT: it folds, turns nothing and trains nothing.
REPRESENTATIVE = {family: "awq" for family in FAMILIES} | {"olmo2": "gptq"}
# Methods that fold into norms, by the family that has none to fold into; `test_refusals.py` sees that they say so.
REFUSED = {"olmo2": ("awq", "smoothquant", "rotate")}


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_model(shape, root / name) for name, shape in FAMILIES.items()}


@pytest.fixture(params=[*sorted(SHAPES), *sorted(FAMILIES)])
def checkpoint(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], family_folders: dict[str, Path]
) -> Path:
    """The checkpoint of each family in turn."""
    return {**checkpoints, **family_folders}[request.param]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    refused = []
    for item in items:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        family, method = chosen.get("checkpoint"), chosen.get("config")
        if method in REFUSED.get(str(family), ()):
            refused.append(item)
        elif family in FAMILIES and method != REPRESENTATIVE[family]:
            item.add_marker("slow")
    config.hook.pytest_deselected(items=refused)
    items[:] = [item for item in items if item not in refused]
