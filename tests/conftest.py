"""What all tests share."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

from tests import contract

CACHE = "JAX_COMPILATION_CACHE_DIR"
MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000
ended = itertools.count(1)
QUICK = (
    "bandit",
    "exhaustive",
    "gradient",
    "population",
    "sequential",
    "stochastic",
    "test_compare.py",
    "test_contract.py",
    "test_docs.py",
)


def pytest_configure(config):
    """What one worker, or a process that a test starts, has compiled, the others read."""
    if CACHE not in os.environ:
        os.environ |= {CACHE: tempfile.mkdtemp(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True, scope="module")
def _quick_compiles(request):
    """Programs of search methods take a third less time to compile without optimizations.

    Not those whose last bit is tested, such as of spaces and lanes: optimizations are what could change it.
    """
    quick = not set(QUICK).isdisjoint(request.path.parts)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimized():
    """Programs of this test are compiled as a user's are: what they cost is what is tested."""
    was = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", was)


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Forgets what was compiled before a process has more memory maps than Linux allows it, 65,530."""
    yield
    # To read the maps takes longer than many tests.
    if next(ended) % 16 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        contract.rig.cache_clear()
        jax.clear_caches()
