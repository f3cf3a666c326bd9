"""The door of the callbacks, and what YAML names."""

import subprocess
import sys

import callbacks


def test_every_name_is_found() -> None:
    for name in callbacks.__all__:
        assert getattr(callbacks, name).__module__.startswith("callbacks.")


def test_opening_the_door_loads_nothing() -> None:
    code = "import sys, callbacks; print([m for m in ('torch', 'lightning', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
