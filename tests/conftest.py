"""Lets the tests import the trainer from the repository's root, wherever pytest is started; the slowest files first."""
import os
import sys
from pathlib import Path

# Before torch is imported: threads that spin while they wait make a busy 2-core machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before triton is imported: without a GPU, its interpreter runs the kernels.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SLOW_FILES = ("test_cli.py", "test_faults.py", "test_trajectory.py")


def pytest_collection_modifyitems(items):
    """So that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)
