"""The search space: a pytree of parameters, and its codec to the unit cube.

Every method works on points `unit` of [0, 1]^dims; `Space` turns them into the user's tree and back in one vectorised
pass over all dims. Real parameters are (log-)uniform, levels of integers and categoricals have equal shares.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxhpo.codec import Codec, Leaf
from jaxhpo.parameters import Categorical, OneOf, Parameter

PyTree = Any
MOST_DIMS = 2048


def working_dtype() -> np.dtype:
    """float32, or float64 where `jax_enable_x64` is on."""
    return np.dtype(jnp.result_type(float))


@jax.tree_util.register_pytree_with_keys_class
class Branches(dict):
    """What a user's function gets at a `OneOf`: a dict whose order, that of the space, survives `jit` and `vmap`."""

    def tree_flatten_with_keys(self) -> tuple[list, tuple]:
        return [(jax.tree_util.DictKey(name), value) for name, value in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple, values: Any) -> "Branches":
        return cls(zip(names, values, strict=True))


class _Constant:
    """A leaf of the user's tree that is no parameter."""

    def __init__(self, value: Any):
        self.value = value


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Parameter) or node is None


def _name(keys: tuple) -> str:
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys]
    return ".".join(names) or "value"


def _lookup(node: Any, keys: tuple) -> Any:
    for key in keys:
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.FlattenedIndexKey):
            node = list(jax.tree_util.default_registry.flatten_one_level(node)[0])[key.key]
        else:
            node = node[getattr(key, "key", getattr(key, "idx", None))]
    return node


class Space:
    """A pytree of parameters, wrapped once.

    Two spaces are equal when compiled code cannot tell them apart: their constants and the names of their options do
    not count. So methods built on equal spaces share what was compiled; `native` and `fill` are to be asked of the
    space that the user gave.

    Args:
      tree: a pytree whose leaves are parameters (`Float`, `Int`, `Categorical`, `Ordinal`, `Array`, `OneOf`) or
        constants (anything else), or a `Space`.

    Attributes:
      dims: number of dims of the unit cube.
      names: path of every dim, such as "optimizer.sgd.momentum".
      levels: i64[dims], number of levels of each dim, 0 where it is real.
      categorical: bool[dims], whether the levels of a dim have no order.
      parent: i64[dims], the dim of the `OneOf` that a dim depends on, -1 where it is always live.
      nesting: how deep `OneOf`s nest, 0 where there is none.
      leaves: the parameters in the order of their dims, a `OneOf` before its branches.

    Raises:
      ValueError, TypeError: a parameter is not valid; the message has its path, the value and the remedy.

    Example:
      >>> import jax.numpy as jnp, jaxhpo as hpo
      >>> space = hpo.Space({"lr": hpo.Float(1e-4, 1.0, log=True), "act": hpo.Categorical(("relu", "gelu")), "clip": 2})
      >>> space.native(space.decode(jnp.array([0.9, 0.5])))
      {'act': 'gelu', 'clip': 2, 'lr': 0.009999999776482582}
    """

    def __init__(self, tree: "PyTree | Space"):
        self.tree: PyTree = tree.tree if isinstance(tree, Space) else tree
        self.leaves: list[Leaf] = []
        self.dims = 0
        expanded = self._expand(self.tree, (), -1, 0)
        if not self.leaves:
            raise ValueError(f"space has no parameters: {tree!r}; put at least one Float, Int or Categorical in it")
        self._entries: list[Any]
        self._treedef: Any
        self._entries, self._treedef = jax.tree.flatten(expanded)
        per_dim = lambda values: np.repeat(np.array(values), [leaf.size for leaf in self.leaves])  # noqa: E731
        self.names = [
            f"{leaf.path}[{i}]" if leaf.size > 1 else leaf.path for leaf in self.leaves for i in range(leaf.size)
        ]
        self.levels = per_dim([leaf.parameter.levels for leaf in self.leaves]).astype(np.int64)
        self.categorical = per_dim([isinstance(leaf.parameter, Categorical | OneOf) for leaf in self.leaves])
        self.parent = per_dim([leaf.parent for leaf in self.leaves])
        self._branch = per_dim([leaf.branch for leaf in self.leaves])
        self.nesting = self._nesting()
        places = tuple(None if isinstance(entry, _Constant) else entry for entry in self._entries)
        facts = tuple((leaf.parameter.signature, leaf.parent, leaf.branch) for leaf in self.leaves)
        self._key = (self._treedef, places, facts)
        self._hash = hash(self._key)
        self._codecs: dict[np.dtype, Codec] = {}
        self._codec()

    @classmethod
    def of(cls, tree: "PyTree | Space", most: int | None = MOST_DIMS) -> "Space":
        """`tree` itself if it is a `Space`, else a `Space` around it.

        Args:
          tree: as above.
          most: how many dims a method can search, `None` if any number.

        Raises:
          ValueError: it has more.
        """
        space = tree if isinstance(tree, Space) else cls(tree)
        if most is not None and space.dims > most:
            largest = max(space.leaves, key=lambda leaf: leaf.size)
            raise ValueError(
                f"space has {space.dims} dims, of which '{largest.path}' takes {largest.size}, but this method "
                f"searches at most {most}; use hpo.gradient, which follows slopes, or a smaller shape"
            )
        return space

    def __repr__(self) -> str:
        return f"Space({self.tree!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def _expand(self, tree: PyTree, prefix: tuple, parent: int, branch: int) -> PyTree:
        """The tree that `decode` returns, with the number of a leaf at each parameter and a `_Constant` elsewhere."""

        def visit(keys: tuple, node: Any) -> Any:
            keys = (*prefix, *keys)
            if not isinstance(node, Parameter):
                _check_constant(node, _name(keys))
                return _Constant(node)
            try:
                node.check()
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"space parameter '{_name(keys)}': {error}") from None
            index, start = len(self.leaves), self.dims
            self.dims += node.dims
            place = (*keys, jax.tree_util.DictKey("choice")) if isinstance(node, OneOf) else keys
            self.leaves.append(Leaf(node, _name(keys), place, start, node.dims, parent, branch, node.kind))
            if not isinstance(node, OneOf):
                return index
            below = enumerate(node.branches.items())
            key = jax.tree_util.DictKey
            return {"choice": index} | {k: self._expand(sub, (*keys, key(k)), start, i) for i, (k, sub) in below}

        return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=_is_leaf)

    def _nesting(self) -> int:
        depth, parent = 0, self.parent
        while (parent >= 0).any():
            depth, parent = depth + 1, np.where(parent >= 0, self.parent[parent], -1)
        return depth

    def _codec(self) -> Codec:
        dtype = working_dtype()
        if dtype not in self._codecs:
            self._codecs[dtype] = Codec(self.leaves, dtype)
        return self._codecs[dtype]

    # Points of the unit cube.

    def decode(self, unit: ArrayLike) -> PyTree:
        """Points of the unit cube as hyperparameters.

        Args:
          unit: float[..., dims] in [0, 1].

        Returns:
          A pytree shaped like the space, with arrays [...] at its parameters, `None` at its constants, and
          `{"choice": i32[...], name: ...}` at a `OneOf`. No value is outside the bounds as the user wrote them.

        Raises:
          ValueError: the last axis of `unit` is not `dims` long.
        """
        return self.unflatten(self._codec().decode(self._points(unit)))

    def encode(self, hparams: PyTree) -> jax.Array:
        """The inverse of `decode`, up to the share of a level: a level's middle. Dims that are not live are 0.5.

        In float32 every level comes back up to 2^22 of them (2^17 in a logarithm), beyond that a near one.

        Args:
          hparams: what `decode` returns, with any leading axes.

        Returns:
          float[..., dims] in [0, 1].
        """
        unit = self._codec().encode(self.flatten(hparams))
        return jnp.where(self.active(unit), unit, 0.5) if self.nesting else unit

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """Uniform points of the unit cube: float[n, dims]; `decode` gives their hyperparameters."""
        # As one row: XLA draws arrays with a short last axis ten times slower on CPU.
        return jax.random.uniform(key, (n * self.dims,), working_dtype()).reshape(n, self.dims)

    def level(self, unit: ArrayLike) -> jax.Array:
        """The level of every dim that has levels: i32[..., dims with levels], in their order."""
        return self._codec().level(self._points(unit))[..., np.flatnonzero(self.levels)]

    def middle(self, level: jax.Array) -> jax.Array:
        """The inverse of `level`: points in the middle of the levels i32[..., dims with levels], of the same shape."""
        return self._codec().middle(level, np.flatnonzero(self.levels))

    def active(self, unit: ArrayLike) -> jax.Array:
        """Which dims are live, those of a branch only where it is chosen: bool[..., dims] for float[..., dims]."""
        points = self._points(unit)
        if not self.nesting:
            return jnp.ones(points.shape, bool)
        is_top, parent = jnp.asarray(self.parent < 0), np.maximum(self.parent, 0)
        chosen = is_top | (self._codec().level(points)[..., parent] == self._branch)
        live = chosen
        for _ in range(self.nesting - 1):
            live = chosen & (is_top | live[..., parent])
        return live

    def _points(self, unit: ArrayLike) -> jax.Array:
        points = jnp.asarray(unit, working_dtype())
        if points.shape[-1:] != (self.dims,):
            raise ValueError(f"unit must be [..., {self.dims}], a coordinate for each dim, got shape {points.shape}")
        return points

    # Trees.

    def flatten(self, hparams: PyTree) -> list:
        """The values in a decoded tree, in the order of `leaves`."""
        found = zip(self._entries, self._treedef.flatten_up_to(_plain(hparams)), strict=True)
        values = {entry: value for entry, value in found if not isinstance(entry, _Constant)}
        return [values[i] for i in range(len(self.leaves))]

    def unflatten(self, values: list) -> PyTree:
        """The inverse of `flatten`, with `None` at constants."""
        entries = [None if isinstance(entry, _Constant) else values[entry] for entry in self._entries]
        return jax.tree.unflatten(self._treedef, entries)

    def fill(self, hparams: PyTree) -> PyTree:
        """`hparams` as a user's function gets them: constants put back where `decode` left `None`, `OneOf`s ordered."""
        return _filled(self.tree, iter(self.flatten(hparams)))

    def soft(self, hparams: PyTree) -> jax.Array | None:
        """Which points have weights of a relaxed choice that are not those of one option: bool[...], or `None`.

        A loss at such weights is not that of any choice. `None` where the space has no relaxed choice.
        """
        relaxed = [w for leaf, w in zip(self.leaves, self.flatten(hparams), strict=True) if leaf.kind == "relaxed"]
        if not relaxed:
            return None
        return jnp.stack([(w.max(-1) < 1) for w in relaxed]).any(0)

    def native(self, hparams: PyTree, i: int | None = None) -> PyTree:
        """Hyperparameters as Python values: options themselves, constants, only the live branch of a `OneOf`.

        Args:
          hparams: what `decode` returns, for one point, or for a batch together with `i`.
          i: row of the batch.
        """
        arrays = [np.asarray(value) for value in self.flatten(hparams)]
        return _native(self.tree, iter(arrays if i is None else [np.asarray(array[i]) for array in arrays]))

    def read(self, point: PyTree) -> PyTree:
        """The inverse of `native`: one point of Python values, checked, as `decode` would return it.

        Branches that are not live are decoded from the middle of the unit cube.

        Raises:
          ValueError: a parameter is missing or its value is not in the space.
        """
        codec = self._codec()
        values = list(codec.middles)
        chosen = {-1: 0}
        for i, leaf in enumerate(self.leaves):
            if chosen.get(leaf.parent) != leaf.branch:
                continue
            try:
                value = _lookup(point, leaf.keys)
            except (KeyError, IndexError, AttributeError, TypeError, ValueError):
                raise ValueError(f"point {point!r} has no '{_name(leaf.keys)}'; give it a value") from None
            try:
                parsed = leaf.parameter.parse(value)
            except ValueError as error:
                raise ValueError(f"point has '{_name(leaf.keys)}': {value!r}, but {error}") from None
            values[i] = codec.cast(leaf, parsed)
            if isinstance(leaf.parameter, OneOf):
                chosen[leaf.start] = parsed
        return self.unflatten(values)


def _filled(tree: PyTree, values: Iterator) -> PyTree:
    """`tree` with the next value at each parameter, in the order of `Space.leaves`."""

    def visit(node: Any) -> Any:
        if not isinstance(node, Parameter):
            return node
        value = next(values)
        if not isinstance(node, OneOf):
            return value
        return Branches({"choice": value} | {name: _filled(subtree, values) for name, subtree in node.branches.items()})

    return jax.tree.map(visit, tree, is_leaf=_is_leaf)


def _plain(tree: PyTree) -> PyTree:
    """`tree` with dicts instead of `Branches`."""
    is_branches = lambda node: isinstance(node, Branches)  # noqa: E731
    to_dict = lambda node: {k: _plain(v) for k, v in node.items()} if is_branches(node) else node  # noqa: E731
    return jax.tree.map(to_dict, tree, is_leaf=lambda node: node is None or is_branches(node))


def _native(tree: PyTree, values: Iterator[np.ndarray]) -> PyTree:
    """`tree` with the next value at each parameter, in the order of `Space.leaves`."""

    def visit(node: Any) -> Any:
        if not isinstance(node, Parameter):
            return node
        value = node.native(next(values))
        if not isinstance(node, OneOf):
            return value
        branches = {name: _native(subtree, values) for name, subtree in node.branches.items()}
        return {"choice": value, value: branches[value]}

    return jax.tree.map(visit, tree, is_leaf=_is_leaf)


def _check_constant(value: Any, path: str) -> None:
    if isinstance(value, Space):
        raise TypeError(f"space constant '{path}' is a Space; put its tree in its place: space.tree")
    if isinstance(value, type) and issubclass(value, Parameter):
        raise TypeError(f"space constant '{path}' is the class {value.__name__}; call it with its bounds or options")
