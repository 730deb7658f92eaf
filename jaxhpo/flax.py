"""Training of flax modules (linen and nnx) with optax optimizers, as a `Trainable`.

Reference:
  V. T. Hoang, B. Morris, P. Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012: swap-or-not, by
  which a batch computes its own few entries of the epoch's permutation.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from jaxhpo.draws import hashed_bits, scramble
from jaxhpo.optimizers import cast, extended
from jaxhpo.trainable import Trainable

PyTree = Any

SHUFFLE_ROUNDS = 24
FLAGS = {"train": True, "training": True, "deterministic": False, "use_running_average": False}


class TrainState(NamedTuple):
    """Where the training of one trial is."""

    params: PyTree
    """what the optimizer moves: linen's collection "params", nnx's `Param`s as nested dicts"""
    collections: PyTree
    """other variables of the module, such as batch statistics"""
    opt_state: PyTree
    """the optimizer's"""
    step: jax.Array
    """i32[], steps taken"""
    order: jax.Array
    """u32[2], the seed of the order of the examples"""


class _Network(NamedTuple):
    """What is needed of a module, linen or nnx."""

    init: Callable
    """(key, hparams, inputs) -> (params, collections)"""
    apply: Callable
    """(key, hparams, params, collections, inputs, train) -> (outputs, collections)"""


def flax_trainable(
    *,
    model: Callable,
    optimizer: Callable,
    loss: Callable,
    train: tuple[PyTree, PyTree],
    valid: tuple[PyTree, PyTree],
    batch_size: int = 64,
    metric: Callable | None = None,
    penalty: Callable | None = None,
    valid_batch_size: int | None = None,
) -> Trainable:
    """Training of a flax module with an optax optimizer on data that fit the device.

    An epoch visits the examples in a random order without replacement; what is left of it when no whole batch
    remains is skipped, each time others. The order depends on the key of `init`, dropout on the key of `step`.
    In training, a module gets `train`, `training`, `deterministic` or `use_running_average` if its `__call__` takes
    one of them, and the random streams it asks for; nnx modules are also set by `train()` and `eval()`.

    Args:
      model: `(hparams) -> flax.linen.Module`, or `(hparams, rngs) -> flax.nnx.Module`. Hyperparameters are traced, so
        they may be values in the module but not its shapes; for widths and depths see `jaxhpo.modules`.
      optimizer: `(hparams) -> optax.GradientTransformation`; to choose among several see `select_optimizer`.
        `update` also gets `value`, `grad` and `value_fn`, for optimizers that search lines.
      loss: `(outputs, targets) -> float[...]`, one number or one per example (or per token, ...), whose mean over the
        batch is minimised; for example `optax.softmax_cross_entropy_with_integer_labels`. If it has a parameter
        `hparams` it gets them too.
      train: inputs and targets; arrays, or pytrees of arrays, float or int[examples, ...].
      valid: the same for `evaluate`.
      batch_size: examples in a batch; all of them is allowed.
      metric: like `loss`, what `evaluate` returns the mean of. Default `loss`.
      penalty: `(params, hparams) -> float[]`, added to the training loss. Here, and not in the optimizer, belongs a
        weight decay that implicit differentiation is to see.
      valid_batch_size: bounds the memory of `evaluate` and `training_loss`, which then go chunk by chunk and weigh
        the means of the chunks by their sizes. Default one pass.

    Returns:
      A `Trainable` whose train state is a `TrainState`. Its `training_loss` is in evaluation mode, over all training
      data; it refuses modules with batch statistics, which `params` do not have.

    Raises:
      TypeError, ValueError: an argument is not what it should be; the message has its name, value and the remedy.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> x = jax.random.normal(jax.random.key(0), (256, 3))
      >>> data = x, x @ jnp.array([[1.0], [-2.0], [0.5]])
      >>> trainable = flax_trainable(
      ...     model=lambda hparams: nn.Dense(1),
      ...     optimizer=lambda hparams: optax.sgd(hparams["lr"]),
      ...     loss=optax.squared_error, train=data, valid=data, batch_size=32)
      >>> @jax.jit
      ... @jax.vmap
      ... def final(lr):
      ...     key, hparams = jax.random.key(1), {"lr": lr}
      ...     step = lambda i, state: trainable.step(jax.random.fold_in(key, i), state, hparams)
      ...     return trainable.evaluate(jax.lax.fori_loop(1, 101, step, trainable.init(key, hparams)), hparams)
      >>> [bool(loss < 1e-6) for loss in final(jnp.array([0.2, 1e-4]))]
      [True, False]
    """
    _check_function("model", model, "hparams")
    _check_function("optimizer", optimizer, "hparams")
    _check_function("loss", loss, "outputs, targets")
    _check_function("metric", metric or loss, "outputs, targets")
    _check_function("penalty", penalty or loss, "params, hparams")
    train, examples = _check_data("train", train)
    valid, _ = _check_data("valid", valid)
    structures: list[Any] = [jax.tree.structure(data) for data in (train, valid)]
    if structures[0] != structures[1]:
        raise ValueError(f"train and valid must have the same structure, got {structures[0]} and {structures[1]}")
    _check_size("batch_size", batch_size)
    if batch_size > examples:
        raise ValueError(
            f"batch_size={batch_size} is larger than the {examples} training examples; "
            f"use at most {examples}, which is full-batch training"
        )
    if valid_batch_size is not None:
        _check_size("valid_batch_size", valid_batch_size)
    network = _nnx(model) if _takes_rngs(model) else _linen(model)
    example = jax.tree.map(lambda x: x[:1], train[0])

    def objective(params: PyTree, data_loss: jax.Array, hparams: PyTree) -> jax.Array:
        return data_loss if penalty is None else data_loss + penalty(params, hparams)

    def average(function: Callable, state: tuple, hparams: PyTree, data: tuple[PyTree, PyTree]) -> jax.Array:
        def of(inputs: PyTree, targets: PyTree) -> jax.Array:
            outputs, _ = network.apply(jax.random.key(0), hparams, *state, inputs, False)
            return _mean(function, outputs, targets, hparams)

        return _in_chunks(of, data, valid_batch_size)

    def init(key: jax.Array, hparams: PyTree) -> TrainState:
        network_key, order_key = jax.random.split(key)
        params, collections = network.init(network_key, hparams, example)
        opt_state = _build(optimizer, hparams).init(params)
        order = jax.random.bits(order_key, (2,), jnp.uint32)
        return TrainState(params, collections, opt_state, jnp.zeros((), jnp.int32), order)

    def step(key: jax.Array, state: TrainState, hparams: PyTree) -> TrainState:
        inputs, targets = train
        if batch_size < examples:
            rows = batch_indices(state.order, state.step, examples, batch_size)
            inputs, targets = jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), train)

        def batch_loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            outputs, collections = network.apply(key, hparams, params, state.collections, inputs, True)
            return objective(params, _mean(loss, outputs, targets, hparams), hparams), collections

        (value, collections), grads = jax.value_and_grad(batch_loss, has_aux=True)(state.params)
        extra = {"value": value, "grad": grads, "value_fn": lambda params: batch_loss(params)[0]}
        updates, opt_state = _build(optimizer, hparams).update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        moved = state._replace(params=params, collections=collections, opt_state=opt_state, step=state.step + 1)
        # Hyperparameters may be wider than parameters (float64, or float32 beside bfloat16); the state may not grow.
        return jax.tree.map(cast, moved, state)

    def evaluate(state: TrainState, hparams: PyTree) -> jax.Array:
        return average(metric or loss, (state.params, state.collections), hparams, valid)

    def training_loss(params: PyTree, hparams: PyTree) -> jax.Array:
        _, collections = jax.eval_shape(lambda key: network.init(key, hparams, example), jax.random.key(0))
        if jax.tree.leaves(collections):
            raise ValueError(
                f"training_loss is a function of params alone, but model has other variables too: {collections}; "
                "for implicit differentiation use a model without batch statistics"
            )
        return objective(params, average(loss, (params, collections), hparams, train), hparams)

    return Trainable(init, step, evaluate, params=lambda state: state.params, training_loss=training_loss)


def batch_indices(order: jax.Array, step: jax.Array, examples: int, batch_size: int) -> jax.Array:
    """The examples of one batch, i32[batch_size]: entries of a permutation of which nothing else is computed.

    Swap-or-not: in every round each position is paired with another one, K - position, and a hash of the pair says
    whether the two swap. So it is a permutation for any number of examples, by a fixed number of rounds.

    Args:
      order: u32[2], the seed of a trial.
      step: i32[], steps taken; every `examples // batch_size` steps a new epoch with a new permutation begins.
      examples: how many there are.
      batch_size: at most `examples`.
    """
    batches = examples // batch_size
    epoch, batch = step // batches, step % batches
    seed = jnp.stack([order[0] + scramble(epoch.astype(jnp.uint32) + 1), order[1]])
    keys = hashed_bits(seed, 2 * SHUFFLE_ROUNDS).reshape(SHUFFLE_ROUNDS, 2)

    def swap_or_not(i: jax.Array, position: jax.Array) -> jax.Array:
        partner = (keys[i, 0] % jnp.uint32(examples)).astype(jnp.int32) - position
        partner = jnp.where(partner < 0, partner + examples, partner)
        pair = jnp.maximum(position, partner).astype(jnp.uint32)
        return jnp.where(scramble(pair ^ keys[i, 1]) >> 31 == 1, partner, position)

    positions = batch.astype(jnp.int32) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    # Each round uses the one before it several times, so fusing many of them compiles exponentially long.
    return jax.lax.fori_loop(0, SHUFFLE_ROUNDS, swap_or_not, positions, unroll=2)


def _linen(model: Callable) -> _Network:
    def build(hparams: PyTree) -> linen.Module:
        module = model(hparams)
        if isinstance(module, linen.Module):
            return module
        remedy = "; let it take (hparams, rngs)" if isinstance(module, nnx.Module) else ""
        raise TypeError(f"model(hparams) must return a flax.linen.Module, got {type(module).__name__}{remedy}")

    def init(key: jax.Array, hparams: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        module = build(hparams)
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        variables = dict(module.init(rngs, inputs, **_flags(module, train=False)))
        return variables.pop("params", {}), variables

    def apply(
        key: jax.Array, hparams: PyTree, params: PyTree, collections: PyTree, inputs: PyTree, train: bool
    ) -> tuple[Any, PyTree]:
        module = build(hparams)
        variables, flags = {"params": params, **collections}, _flags(module, train)
        if not train:
            return module.apply(variables, inputs, **flags), collections
        # Streams of other names than these come from "params".
        rngs = {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}
        outputs, moved = module.apply(variables, inputs, rngs=rngs, mutable=list(collections), **flags)
        return outputs, {**collections, **moved}

    return _Network(init, apply)


def _nnx(model: Callable) -> _Network:
    is_collection = nnx.All(nnx.Variable, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))

    def build(key: jax.Array, hparams: PyTree) -> nnx.Module:
        module = model(hparams, rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise TypeError(f"model(hparams, rngs) must return a flax.nnx.Module, got {type(module).__name__}")
        return module

    def split(module: nnx.Module) -> tuple[PyTree, PyTree]:
        params, collections = nnx.state(module, nnx.Param), nnx.state(module, is_collection)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(collections)

    def init(key: jax.Array, hparams: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        del inputs
        return split(build(key, hparams))

    def apply(
        key: jax.Array, hparams: PyTree, params: PyTree, collections: PyTree, inputs: PyTree, train: bool
    ) -> tuple[Any, PyTree]:
        # Built anew from today's hyperparameters and the step's random streams; the values it is initialised with
        # are replaced, so the compiler drops their computation.
        module = build(key, hparams)
        nnx.update(module, params)
        nnx.update(module, collections)
        module.train() if train else module.eval()
        return module(inputs, **_flags(module, train)), split(module)[1]

    return _Network(init, apply)


def _flags(module: Any, train: bool) -> dict[str, Any]:
    """The arguments by which a module's `__call__` wants to know whether this is training."""
    takes = inspect.signature(module.__call__).parameters
    return {name: value is train for name, value in FLAGS.items() if name in takes}


def _takes_rngs(model: Any) -> bool:
    if isinstance(model, linen.Module | nnx.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be a function, got {kind}; write `model=lambda hparams: {kind}(...)`")
    # The metaclass of nnx modules hides their signature.
    function = model.__init__ if isinstance(model, type) else model  # type: ignore[misc]
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "rngs" not in parameters and len(required) > 1:
        raise TypeError(f"model must take (hparams), or for nnx (hparams, rngs), got ({', '.join(parameters)})")
    return "rngs" in parameters


def _build(optimizer: Callable, hparams: PyTree) -> optax.GradientTransformationExtraArgs:
    return extended("optimizer(hparams)", optimizer(hparams))


def _mean(function: Callable, outputs: Any, targets: Any, hparams: PyTree) -> jax.Array:
    extra = {"hparams": hparams} if "hparams" in inspect.signature(function).parameters else {}
    values = jnp.asarray(function(outputs, targets, **extra))
    most = max(sum(x.size for x in jax.tree.leaves(tree)) for tree in (outputs, targets))
    if values.size > most:
        shapes = jax.tree.map(jnp.shape, (outputs, targets))
        raise ValueError(
            f"loss must give at most one number per output, got shape {values.shape} from outputs and targets of "
            f"shapes {shapes}, which broadcast against each other; reshape one of them"
        )
    return values.mean()


def _in_chunks(function: Callable, data: PyTree, chunk: int | None) -> jax.Array:
    """The mean over all examples of a function that returns the mean over those it is given."""
    examples = jax.tree.leaves(data)[0].shape[0]
    if chunk is None or chunk >= examples:
        return function(*data)
    whole, rest = divmod(examples, chunk)

    def part(i: jax.Array) -> jax.Array:
        return function(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk), data))

    total = jax.lax.map(part, jnp.arange(whole)).sum() * chunk
    if rest:
        total += function(*jax.tree.map(lambda x: x[whole * chunk :], data)) * rest
    return total / examples


def _check_function(name: str, function: Any, takes: str) -> None:
    if not callable(function):
        kind = type(function).__name__
        raise TypeError(f"{name} must be a function of ({takes}), got {kind}; write `{name}=lambda {takes}: ...`")


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _check_data(name: str, data: Any) -> tuple[tuple[PyTree, PyTree], int]:
    """The data on the device, and the number of examples."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"{name} must be a tuple (inputs, targets), got {type(data).__name__}")
    data = jax.tree.map(jnp.asarray, tuple(data))
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(data)}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if not jax.tree.leaves(data[0]) or not jax.tree.leaves(data[1]) or None in lengths or len(lengths) > 1:
        raise ValueError(f"the arrays of {name} must have one leading axis, the examples, in common, got {shapes}")
    (examples,) = lengths
    if not examples:
        raise ValueError(f"{name} must have at least one example, got shapes {shapes}")
    return data, examples
