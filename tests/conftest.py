"""What all tests share."""

from pathlib import Path

import jax
import pytest

from tests import contract

MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Forgets what was compiled before a process has more memory maps than Linux allows it, 65,530."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        contract.rig.cache_clear()
        jax.clear_caches()
