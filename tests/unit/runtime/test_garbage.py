"""What is imported stays, and the garbage collector need not look through it."""

from __future__ import annotations

import gc
import subprocess
import sys

from lsiq.runtime.garbage import uncollected_imports

FIRST = """
import gc
from lsiq.runtime.garbage import uncollected_imports
with uncollected_imports():
    assert not gc.isenabled()
    import decimal
assert gc.isenabled()
assert not any(thing is decimal.Decimal for thing in gc.get_objects())
"""


def test_what_is_imported_is_out_of_the_collectors_sight() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_beside_what_is_there_already_nothing_changes() -> None:
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    with uncollected_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_process_that_has_only_met_others_has_no_garbage_yet() -> None:
    """Torch is there then; transformers is not."""
    code = FIRST.replace("import gc\n", "import gc, torch\n", 1).replace("imports():", "imports(beside_torch=True):")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
