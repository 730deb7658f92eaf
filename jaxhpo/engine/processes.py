"""Studies that several processes run together.

Each process runs the same program on the same arguments, and an operation over all devices waits for every one of
them. So what a host decides by its clock, its files or its callbacks, the first process decides for all.
"""

import functools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

PyTree = Any
T = TypeVar("T")
HEAD, PAGE, LENGTH = 256, 2**16, 8


class Alone:
    """The one process of a study."""

    first = True
    """whether it is the process that decides, writes and shows"""

    def agree(self, value: T) -> T:
        """The value of the first process."""
        return value

    def once(self, fn: Callable[[], T]) -> T:
        """What `fn()` returns, or raises, in the first process; it is not called in the others."""
        return fn()

    def check_alike(self, describe: Callable[[], dict[str, str]]) -> None:
        """Sees that all processes were given the same."""

    def place(self, tree: PyTree, shardings: Any) -> PyTree:
        """A tree that each process has, on the devices of a sharding or of a prefix tree of them."""
        return jax.device_put(tree, shardings)

    def fetch(self, tree: PyTree) -> PyTree:
        """The arrays of a tree as those of NumPy, in each process."""
        return jax.device_get(tree)

    def local(self, tree: PyTree) -> PyTree:
        """A tree that is on every device, as arrays with which a process can compute by itself."""
        return tree


class Together(Alone):
    """One of the processes whose devices are in a mesh."""

    def __init__(self, mesh: Mesh):
        # One device of each process is enough to send a message.
        own = {device.process_index: device for device in mesh.devices.flat}
        senders = [own[index] for index in sorted(own)]
        self.first = min(own) == jax.process_index()
        self.count = len(senders)
        among = Mesh(np.array(senders), ("processes",))
        self.rows = NamedSharding(among, PartitionSpec("processes"))
        self.largest = jax.jit(_largest, out_shardings=NamedSharding(among, PartitionSpec()))
        self.spread = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def _maximum(self, mine: np.ndarray) -> np.ndarray:
        """The largest over the processes, element by element."""
        shape = self.count, *mine.shape
        return np.asarray(self.largest(jax.make_array_from_callback(shape, self.rows, lambda _: mine[None])))

    def _from_first(self, content: bytes, size: int) -> bytes:
        mine = np.zeros(size, np.uint8)
        if self.first:
            mine[: len(content)] = np.frombuffer(content, np.uint8)
        return self._maximum(mine).tobytes()

    def agree(self, value: T) -> T:
        """The value of the first process."""
        content = pickle.dumps(value) if self.first else b""
        head = self._from_first(len(content).to_bytes(LENGTH) + content[: HEAD - LENGTH], HEAD)
        size, body = int.from_bytes(head[:LENGTH]), head[LENGTH:]
        if size > len(body):
            body += self._from_first(content[len(body) :], -(-(size - len(body)) // PAGE) * PAGE)
        return pickle.loads(body[:size])

    def once(self, fn: Callable[[], T]) -> T:
        """What `fn()` returns, or raises, in the first process; it is not called in the others."""
        value: Any = None
        error: BaseException | None = None
        if self.first:
            try:
                value = fn()
            except BaseException as raised:  # whatever it is, the others wait to hear of it
                error = raised
        value, told = self.agree((value, _portable(error)))
        failure = error or told
        if failure is not None:
            raise failure
        return value

    def check_alike(self, describe: Callable[[], dict[str, str]]) -> None:
        """Sees that all processes were given the same."""
        description = describe()
        expected = self.agree(description)
        differs = [description[name] != expected[name] for name in expected]
        anywhere = self._maximum(np.array(differs, np.uint8))
        if anywhere.any():
            names = ", ".join(name for name, bad in zip(expected, anywhere, strict=True) if bad)
            raise ValueError(
                f"the processes of mesh were given different arguments ({names}); call minimize in each with the same"
            )

    def place(self, tree: PyTree, shardings: Any) -> PyTree:
        """A tree that each process has, on the devices of a sharding or of a prefix tree of them."""
        return jax.tree.map(lambda sharding, part: jax.tree.map(lambda x: _placed(x, sharding), part), shardings, tree)

    def fetch(self, tree: PyTree) -> PyTree:
        """The arrays of a tree as those of NumPy, in each process."""
        # One after the other, so that a device has to have room for the largest only.
        return jax.tree.map(lambda x: np.asarray(x if x.is_fully_replicated else self.spread(x)), tree)

    def local(self, tree: PyTree) -> PyTree:
        """A tree that is on every device, as arrays with which a process can compute by itself."""
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


@functools.lru_cache(maxsize=16)
def processes_of(mesh: Mesh | None) -> Alone:
    """The processes whose devices are in a mesh."""
    return Together(mesh) if mesh is not None and mesh.is_multi_process else Alone()


def _largest(rows: jax.Array) -> jax.Array:
    return rows.max(0)


def _same(x: jax.Array) -> jax.Array:
    return x


def _placed(x: Any, sharding: Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_placed(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(_same, out_shardings=sharding)(x)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)


def _portable(error: BaseException | None) -> BaseException | None:
    """An error, or one that says the same, which another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__} in the first process: {error}")
