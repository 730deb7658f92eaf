"""The search space: a pytree of parameters, and its codec to the unit cube.

Every method works on points `unit` of [0, 1]^dims; `Space` turns them into the user's tree and back in one vectorised
pass over all dims. Real parameters are (log-)uniform, levels of integers and categoricals have equal shares.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.parameters import Array, Categorical, Float, Int, OneOf, Ordinal, Parameter

PyTree = Any


def working_dtype() -> np.dtype:
    """float32, or float64 where `jax_enable_x64` is on."""
    return np.dtype(jnp.result_type(float))


class Leaf(NamedTuple):
    """One parameter of the tree and the dims that belong to it."""

    parameter: Any
    path: str  # "optimizer.sgd.momentum"
    start: int  # first dim
    size: int  # number of dims
    parent: int  # dim of the OneOf that this leaf depends on, -1 = always live
    branch: int  # the level of that dim at which it is live
    kind: str  # "real" | "index" | "float" | "int" | "bool" | "relaxed": what it decodes to


class _Subtree(NamedTuple):
    treedef: Any
    keys: tuple  # the key path of every entry within this subtree
    entries: tuple  # of _Constant, int (index of a leaf) or _Choice


class _Constant(NamedTuple):
    value: Any


class _Choice(NamedTuple):
    leaf: int
    branches: dict[str, _Subtree]


def _kind(parameter: Parameter) -> str:
    if isinstance(parameter, Float | Array):
        return "real"
    if isinstance(parameter, Categorical | Ordinal):
        if getattr(parameter, "relaxed", False):
            return "relaxed"
        types = {np.asarray(o).dtype.kind if np.ndim(o) == 0 else "O" for o in parameter.options}
        if types == {"b"}:
            return "bool"
        if types <= {"i", "u"} and all(-(2**31) <= o < 2**31 for o in parameter.options):
            return "int"
        if types <= {"i", "u", "f"}:
            return "float"
    return "index"


def _levels(parameter: Parameter) -> int:
    if isinstance(parameter, Int):
        return parameter.levels
    if isinstance(parameter, Categorical | Ordinal):
        return len(parameter.options)
    return len(parameter.branches) if isinstance(parameter, OneOf) else 0


def _join(path: str, keys: tuple) -> str:
    parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys]
    return ".".join(([path] if path else []) + parts)


def _lookup(node: Any, keys: tuple) -> Any:
    for key in keys:
        node = getattr(node, key.name) if hasattr(key, "name") else node[getattr(key, "key", getattr(key, "idx", None))]
    return node


def _inward(low: float, high: float, dtype: np.dtype) -> tuple[np.floating, np.floating]:
    """The smallest and largest normal numbers of `dtype` in [low, high]."""
    tiny = float(np.finfo(dtype).tiny)
    low = tiny if 0 < low < tiny else low
    high = -tiny if -tiny < high < 0 else high
    with np.errstate(over="ignore"):
        a, b = dtype.type(low), dtype.type(high)
    a = a if float(a) >= low else np.nextafter(a, dtype.type(np.inf))
    b = b if float(b) <= high else np.nextafter(b, dtype.type(-np.inf))
    return a, b


class _Real(NamedTuple):
    """Constants of the real dims, one entry a dim."""

    columns: np.ndarray
    low: np.ndarray  # ends of the interval, in the logarithm where `log`
    high: np.ndarray
    log: np.ndarray
    floor: np.ndarray  # smallest and largest value to be decoded
    ceiling: np.ndarray


class _Levels(NamedTuple):
    """Constants of the dims with levels, one entry a dim."""

    columns: np.ndarray
    count: np.ndarray  # number of levels
    top: np.ndarray  # the last level as a float that does not exceed it
    log: np.ndarray
    low: np.ndarray  # of log integers: first value, and the ends of the interval in the logarithm
    log_low: np.ndarray
    log_high: np.ndarray
    first: np.ndarray  # i32: value of level 0
    step: np.ndarray  # i32


class Space:
    """A pytree of parameters, wrapped once.

    Two spaces are equal when compiled code cannot tell them apart: their constants and the names of their options do
    not count. So methods built on equal spaces share what was compiled.

    Args:
      tree: a pytree whose leaves are parameters (`Float`, `Int`, `Categorical`, `Ordinal`, `Array`, `OneOf`) or
        constants (anything else), or a `Space`.

    Attributes:
      dims: number of dims of the unit cube.
      names: path of every dim, such as "optimizer.sgd.momentum".
      levels: i64[dims], number of levels of each dim, 0 where it is real.
      categorical: bool[dims], whether the levels of a dim have no order.
      leaves: the parameters in the order of their dims.

    Raises:
      ValueError, TypeError: a parameter is not valid; the message has its path, the value and the remedy.

    Example:
      >>> import jax.numpy as jnp, jaxhpo as hpo
      >>> space = hpo.Space({"lr": hpo.Float(1e-4, 1.0, log=True), "act": hpo.Categorical(("relu", "gelu")), "clip": 2})
      >>> space.native(space.decode(jnp.array([0.9, 0.5])))
      {'act': 'gelu', 'clip': 2, 'lr': 0.009999999776482582}
    """

    def __init__(self, tree: PyTree):
        tree = tree.tree if isinstance(tree, Space) else tree
        self.tree = tree
        self.leaves: list[Leaf] = []
        self.dims = 0
        self._root = self._walk(tree, "", -1, 0)
        if not self.leaves:
            raise ValueError(f"space has no parameters: {tree!r}; put at least one Float, Int or Categorical in it")
        repeat = np.array([leaf.size for leaf in self.leaves])
        per_dim = lambda values, dtype: np.repeat(np.array(values, dtype), repeat)  # noqa: E731
        self.names = [
            f"{leaf.path or 'value'}[{i}]" if leaf.size > 1 else leaf.path or "value"
            for leaf in self.leaves
            for i in range(leaf.size)
        ]
        self.levels = per_dim([_levels(leaf.parameter) for leaf in self.leaves], np.int64)
        self.categorical = per_dim([isinstance(leaf.parameter, Categorical | OneOf) for leaf in self.leaves], bool)
        self._parent = per_dim([leaf.parent for leaf in self.leaves], np.int64)
        self._branch = per_dim([leaf.branch for leaf in self.leaves], np.int64)
        self._depth = self._nesting()
        self._key = (self._structure(self._root), tuple(self._fact(leaf) for leaf in self.leaves))
        self._real(working_dtype())

    @classmethod
    def of(cls, tree: "PyTree | Space") -> "Space":
        """`tree` itself if it is a `Space`, else a `Space` around it."""
        return tree if isinstance(tree, Space) else cls(tree)

    def __repr__(self) -> str:
        return f"Space({self.tree!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    # Layout: which dims belong to which leaf.

    def _walk(self, tree: PyTree, path: str, parent: int, branch: int) -> _Subtree:
        is_leaf = lambda x: isinstance(x, Parameter) or x is None  # noqa: E731
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        entries: list[Any] = []
        for keys, value in flat:
            where = _join(path, keys)
            if not isinstance(value, Parameter):
                entries.append(_Constant(value))
                continue
            try:
                value.check()
            except (ValueError, TypeError) as error:
                raise type(error)(f"space parameter '{where or 'value'}': {error}") from None
            size = int(np.prod(value.sizes)) if isinstance(value, Array) else 1
            index = len(self.leaves)
            self.leaves.append(Leaf(value, where, self.dims, size, parent, branch, _kind(value)))
            dim = self.dims
            self.dims += size
            if isinstance(value, OneOf):
                names = enumerate(value.branches.items())
                walk = {name: self._walk(sub, _join(where, (name,)), dim, i) for i, (name, sub) in names}
                entries.append(_Choice(index, walk))
            else:
                entries.append(index)
        return _Subtree(treedef, tuple(keys for keys, _ in flat), tuple(entries))

    def _nesting(self) -> int:
        depth, parent = 0, self._parent
        while (parent >= 0).any():
            depth, parent = depth + 1, np.where(parent >= 0, self._parent[parent], -1)
        return depth

    def _structure(self, subtree: _Subtree) -> Any:
        described = tuple(
            ("choice", e.leaf, tuple((k, self._structure(v)) for k, v in e.branches.items()))
            if isinstance(e, _Choice)
            else ("constant" if isinstance(e, _Constant) else e)
            for e in subtree.entries
        )
        return subtree.treedef, described

    @staticmethod
    def _fact(leaf: Leaf) -> tuple:
        p = leaf.parameter
        bounds = (p.low, p.high, p.log) if hasattr(p, "low") else ()
        values = tuple(p.options) if leaf.kind in ("float", "int", "bool") else ()
        unordered = isinstance(p, Categorical | OneOf)
        shape = p.sizes if isinstance(p, Array) else ()
        extra = (unordered, shape, getattr(p, "step", 1))
        return leaf.kind, leaf.start, leaf.parent, leaf.branch, _levels(p), bounds, values, extra

    # Constants of the codec, for a working dtype.

    def _members(self, *kinds: str) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf.kind in kinds]

    @functools.cache  # noqa: B019 - a space lives as long as the methods built on it
    def _real(self, dtype: np.dtype) -> _Real:
        rows: list[tuple] = []
        for leaf in self._members("real"):
            p = leaf.parameter
            floor, ceiling = _inward(float(p.low), float(p.high), dtype)
            if floor > ceiling:
                raise ValueError(
                    f"space parameter '{leaf.path}': no {dtype} lies between low={p.low!r} and high={p.high!r}; "
                    "widen them, or enable float64"
                )
            ends = (np.log(float(p.low)), np.log(float(p.high))) if p.log else (floor, ceiling)
            rows += [(leaf.start + i, *ends, p.log, floor, ceiling) for i in range(leaf.size)]
        columns, low, high, log, floor, ceiling = zip(*rows, strict=True) if rows else ((),) * 6
        cast = lambda x: np.asarray(x, dtype)  # noqa: E731
        return _Real(
            np.asarray(columns, int), cast(low), cast(high), np.asarray(log, bool), cast(floor), cast(ceiling)
        )

    @functools.cache  # noqa: B019
    def _discrete(self, dtype: np.dtype) -> _Levels:
        rows = []
        for leaf in self.leaves:
            p, count = leaf.parameter, _levels(leaf.parameter)
            if leaf.kind == "real":
                continue
            log = isinstance(p, Int) and p.log
            ends = (np.log(p.low - 0.5), np.log(p.low + count - 0.5)) if log else (0.0, 0.0)
            low = p.low if log else 0
            first, step = (p.low, p.step) if isinstance(p, Int) else (0, 1)
            rows.append((leaf.start, count, _inward(0, count - 1, dtype)[1], log, low, *ends, first, step))
        columns, count, top, log, low, log_low, log_high, first, step = zip(*rows, strict=True) if rows else ((),) * 9
        real, integer = lambda x: np.asarray(x, dtype), lambda x: np.asarray(x, np.int32)
        return _Levels(
            np.asarray(columns, int),
            real(count),
            real(top),
            np.asarray(log, bool),
            real(low),
            real(log_low),
            real(log_high),
            integer(first),
            integer(step),
        )

    @functools.cache  # noqa: B019
    def _tables(self, kind: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Values of the numeric options: position of each leaf among the dims with levels, and [leaf, level]."""
        members = self._members(kind)
        discrete = [leaf.start for leaf in self.leaves if leaf.kind != "real"]
        width = max((len(m.parameter.options) for m in members), default=0)
        cast = {"float": dtype, "int": np.dtype(np.int32), "bool": np.dtype(bool)}[kind]
        values = [tuple(m.parameter.options) + (m.parameter.options[-1],) * (width - _levels(m.parameter)) for m in members]
        return np.array([discrete.index(m.start) for m in members], int), np.array(values, cast).reshape(-1, width)

    # The codec.

    def level(self, unit: jax.Array) -> jax.Array:
        """The level of every dim that has levels: i32[..., dims with levels], in their order."""
        c = self._discrete(working_dtype())
        u = unit[..., c.columns]
        linear = jnp.floor(u * c.count)
        exponent = jnp.where(c.log, c.log_low * (1 - u) + c.log_high * u, 0)
        index = jnp.where(c.log, jnp.round(jnp.exp(exponent)) - c.low, linear)
        return jnp.clip(index, 0, c.top).astype(jnp.int32)

    def decode(self, unit: jax.Array) -> PyTree:
        """Points of the unit cube as hyperparameters.

        Args:
          unit: float[..., dims] in [0, 1].

        Returns:
          A pytree shaped like the space, with arrays [...] at its parameters, `None` at its constants, and
          `{"choice": i32[...], name: ...}` at a `OneOf`. No value is outside the bounds as the user wrote them.
        """
        dtype = working_dtype()
        unit = jnp.asarray(unit, dtype)
        lead = unit.shape[:-1]
        r = self._real(dtype)
        u = unit[..., r.columns]
        mix = r.low * (1 - u) + r.high * u
        real = jnp.clip(jnp.where(r.log, jnp.exp(jnp.where(r.log, mix, 0)), mix), r.floor, r.ceiling)
        level = self.level(unit)
        c = self._discrete(dtype)
        position = {column: i for i, column in enumerate(c.columns.tolist())}
        values: dict[int, jax.Array] = {}

        def split(members: list[Leaf], columns: jax.Array) -> None:
            if members:
                parts = jax.lax.split(columns, [m.size for m in members], axis=columns.ndim - 1)
                for member, part in zip(members, parts, strict=True):
                    shape = member.parameter.sizes if isinstance(member.parameter, Array) else ()
                    values[member.start] = part.reshape(lead + shape)

        split(self._members("real"), real)
        indices = self._members("index")
        at = np.array([position[m.start] for m in indices], int)
        split(indices, c.first[at] + c.step[at] * level[..., at])
        for kind in ("float", "int", "bool"):
            at, table = self._tables(kind, dtype)
            split(self._members(kind), jnp.asarray(table)[np.arange(len(at)), level[..., at]])
        for m in self._members("relaxed"):
            values[m.start] = jax.nn.one_hot(level[..., position[m.start]], _levels(m.parameter), dtype=dtype)
        return self._build(self._root, lambda leaf: values[leaf.start], lambda constant: None)

    def encode(self, hparams: PyTree) -> jax.Array:
        """The inverse of `decode`, up to the share of a level: a level's middle. Dims that are not live are 0.5.

        Args:
          hparams: what `decode` returns, with any leading axes.

        Returns:
          float[..., dims] in [0, 1].
        """
        dtype = working_dtype()
        values = {leaf.start: value for leaf, value in self._flatten(self._root, hparams)}
        lead = next(jnp.shape(v)[: jnp.ndim(v) - self._rank(leaf)] for leaf in self.leaves for v in [values[leaf.start]])

        def join(members: list[Leaf]) -> jax.Array:
            columns = [jnp.reshape(jnp.asarray(values[m.start]), (*lead, m.size)) for m in members]
            return jnp.concatenate(columns, axis=-1) if columns else jnp.zeros((*lead, 0))

        r, c = self._real(dtype), self._discrete(dtype)
        x = join(self._members("real")).astype(dtype)
        x = jnp.where(r.log, jnp.log(jnp.where(r.log, x, 1)), x)
        real = (x / 2 - r.low / 2) / np.where(r.high > r.low, r.high / 2 - r.low / 2, 1)
        position = {column: i for i, column in enumerate(c.columns.tolist())}
        level = jnp.zeros((*lead, len(c.columns)), jnp.int32)
        indices = self._members("index")
        if indices:
            at = np.array([position[m.start] for m in indices], int)
            level = level.at[..., at].set((join(indices) - c.first[at]) // c.step[at])
        for kind in ("float", "int", "bool"):
            members = self._members(kind)
            if members:
                at, table = self._tables(kind, dtype)
                distance = jnp.abs(table.astype(dtype) - join(members)[..., None].astype(dtype))
                level = level.at[..., at].set(jnp.argmin(distance, axis=-1))
        for m in self._members("relaxed"):
            level = level.at[..., position[m.start]].set(jnp.argmax(values[m.start], axis=-1))
        log_value = jnp.log(jnp.where(c.log, level + c.low, 1).astype(dtype))
        log_unit = (log_value - c.log_low) / np.where(c.log, c.log_high - c.log_low, 1)
        discrete = jnp.where(c.log, log_unit, (level + 0.5) / c.count)
        order = np.argsort(np.concatenate([r.columns, c.columns]), kind="stable")
        unit = jnp.clip(jnp.concatenate([real, discrete], axis=-1)[..., order], 0, 1).astype(dtype)
        return jnp.where(self.active(unit), unit, jnp.asarray(0.5, dtype))

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """Uniform points of the unit cube: float[n, dims]; `decode` gives their hyperparameters."""
        return jax.random.uniform(key, (n, self.dims), working_dtype())

    def active(self, unit: jax.Array) -> jax.Array:
        """Which dims are live, those of a branch only where it is chosen: bool[..., dims] for float[..., dims]."""
        if not self._depth:
            return jnp.ones(jnp.shape(unit), bool)
        c = self._discrete(working_dtype())
        parent = np.searchsorted(c.columns, np.maximum(self._parent, 0))
        chosen = self.level(jnp.asarray(unit))[..., np.minimum(parent, len(c.columns) - 1)] == self._branch
        chosen |= self._parent < 0
        live = chosen
        for _ in range(self._depth - 1):
            live = chosen & (live[..., np.maximum(self._parent, 0)] | (self._parent < 0))
        return live

    # The user's side: native Python values, constants included.

    def fill(self, hparams: PyTree) -> PyTree:
        """`hparams` with the constants of the space put back where `decode` left `None`."""
        values = {leaf.start: value for leaf, value in self._flatten(self._root, hparams)}
        return self._build(self._root, lambda leaf: values[leaf.start], lambda constant: constant)

    def native(self, hparams: PyTree, i: int | None = None) -> PyTree:
        """Hyperparameters as Python values: options themselves, constants, only the live branch of a `OneOf`.

        Args:
          hparams: what `decode` returns, for one point, or for a batch together with `i`.
          i: row of the batch.
        """
        values = {leaf.start: np.asarray(v if i is None else v[i]) for leaf, v in self._flatten(self._root, hparams)}
        return self._build(self._root, lambda leaf: self._python(leaf, values[leaf.start]), lambda c: c, native=True)

    @staticmethod
    def _python(leaf: Leaf, value: np.ndarray) -> Any:
        p = leaf.parameter
        if isinstance(p, Array):
            return value
        if leaf.kind == "relaxed":
            return p.options[int(np.argmax(value))]
        if isinstance(p, OneOf):
            return list(p.branches)[int(value)]
        if leaf.kind in ("float", "int", "bool"):
            return p.options[int(np.argmin(np.abs(np.array(p.options, float) - float(value))))]
        if isinstance(p, Categorical | Ordinal):
            return p.options[int(value)]
        return int(value) if isinstance(p, Int) else float(value)

    def read(self, point: PyTree) -> PyTree:
        """The inverse of `native`: one point of Python values, checked, as `decode` would return it.

        Raises:
          ValueError: a parameter is missing or its value is not in the space.
        """
        fallback = {
            leaf.start: v for leaf, v in self._flatten(self._root, self.decode(np.full(self.dims, 0.5)))
        }
        values = {}

        def visit(subtree: _Subtree, node: Any, path: str) -> None:
            for keys, entry in zip(subtree.keys, subtree.entries, strict=True):
                if isinstance(entry, _Constant):
                    continue
                where = _join(path, keys) or "value"
                try:
                    value = _lookup(node, keys)
                except (KeyError, IndexError, AttributeError, TypeError):
                    raise ValueError(f"point {point!r} has no '{where}'; give every live parameter a value") from None
                if not isinstance(entry, _Choice):
                    values[self.leaves[entry].start] = self._checked(self.leaves[entry], value)
                    continue
                names = list(entry.branches)
                choice = value.get("choice") if isinstance(value, dict) else None
                if choice not in names:
                    raise ValueError(f"point has '{where}': {value!r}, but 'choice' must be one of {names}")
                values[self.leaves[entry.leaf].start] = np.int32(names.index(choice))
                visit(entry.branches[choice], value.get(choice, {}), _join(where, (choice,)))

        visit(self._root, point, "")
        merged = {**fallback, **values}
        return self._build(self._root, lambda leaf: merged[leaf.start], lambda constant: None)

    @staticmethod
    def _checked(leaf: Leaf, value: Any) -> Any:
        p, where = leaf.parameter, f"point has '{leaf.path}': {value!r}, but"
        if isinstance(p, Categorical | Ordinal):
            found = [i for i, option in enumerate(p.options) if option is value or bool(np.all(option == value))]
            if not found:
                raise ValueError(f"{where} it must be one of {tuple(p.options)}")
            if leaf.kind == "relaxed":
                return np.eye(len(p.options), dtype=working_dtype())[found[0]]
            return np.int32(found[0]) if leaf.kind == "index" else p.options[found[0]]
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or array.shape != (p.sizes if isinstance(p, Array) else ()):
            raise ValueError(f"{where} a number{'s' if isinstance(p, Array) else ''} in [{p.low}, {p.high}] is needed")
        if not ((array >= p.low) & (array <= p.high)).all():
            raise ValueError(f"{where} it must lie in [{p.low}, {p.high}]")
        if isinstance(p, Int):
            if (array - p.low) % p.step:
                raise ValueError(f"{where} it must be {p.low} plus a multiple of {p.step}")
            return np.int32(array)
        return np.clip(array, *_inward(float(p.low), float(p.high), working_dtype())).astype(working_dtype())

    # Trees.

    @staticmethod
    def _rank(leaf: Leaf) -> int:
        return len(leaf.parameter.sizes) if isinstance(leaf.parameter, Array) else int(leaf.kind == "relaxed")

    def _build(
        self, subtree: _Subtree, value: Callable[[Leaf], Any], constant: Callable[[Any], Any], native: bool = False
    ) -> PyTree:
        entries = []
        for entry in subtree.entries:
            if isinstance(entry, _Constant):
                entries.append(constant(entry.value))
            elif isinstance(entry, _Choice):
                choice = value(self.leaves[entry.leaf])
                live = {k: s for k, s in entry.branches.items() if not native or k == choice}
                below = {k: self._build(s, value, constant, native) for k, s in live.items()}
                entries.append({"choice": choice, **below})
            else:
                entries.append(value(self.leaves[entry]))
        return jax.tree.unflatten(subtree.treedef, entries)

    def _flatten(self, subtree: _Subtree, hparams: PyTree) -> list[tuple[Leaf, Any]]:
        found = []
        for entry, node in zip(subtree.entries, subtree.treedef.flatten_up_to(hparams), strict=True):
            if isinstance(entry, _Choice):
                found.append((self.leaves[entry.leaf], node["choice"]))
                for name, branch in entry.branches.items():
                    found += self._flatten(branch, node[name])
            elif not isinstance(entry, _Constant):
                found.append((self.leaves[entry], node))
        return found
