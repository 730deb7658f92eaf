"""The derivative of where training ends, by the implicit function theorem: nothing of the way there is needed.

Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit differentiation. Pedregosa
(2016), Hyperparameter optimization with approximate gradient. Bai, Kolter and Koltun (2019), Deep equilibrium models:
the same at the fixed point of a step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from jaxhpo.checks import one_of, real, whole
from jaxhpo.gradient.exact import begin, train
from jaxhpo.gradient.floats import hoist, is_zero, refuse_others, split_floats
from jaxhpo.trainable import Trainable

PyTree = Any
Vector = list[jax.Array]
SOLVERS = ("cg", "normal_cg", "neumann")
POWER_STEPS = 10


def plus(x: Vector, scale: Any, y: Vector) -> Vector:
    """x + scale * y"""
    return jax.tree.map(lambda a, b: a + jnp.asarray(scale, a.dtype) * b, x, y)


def norm(x: Vector) -> jax.Array:
    """float[]: the Euclidean norm."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf).real for leaf in x))


def largest(matvec: Callable, like: Vector) -> jax.Array:
    """float[]: about the largest eigenvalue, in size, by some products with a random vector."""
    keys = jax.random.split(jax.random.key(0), len(like))
    start = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, like, strict=True)]
    tiny = jnp.finfo(like[0].dtype).tiny

    def multiply(_: Any, vector: Vector) -> Vector:
        size = jnp.maximum(norm(vector), tiny)
        return matvec([x / size.astype(x.dtype) for x in vector])

    return jnp.maximum(norm(jax.lax.fori_loop(0, POWER_STEPS, multiply, start)), tiny)


def neumann(matvec: Callable, b: Vector, steps: int, scale: Any) -> Vector:
    """The solution of `matvec(x) = b` as some terms of scale * sum_i (1 - scale * A)^i b (Lorraine et al., eq. 8)."""

    def add(_: Any, carry: tuple[Vector, Vector]) -> tuple[Vector, Vector]:
        x, term = carry
        term = plus(term, -scale, matvec(term))
        return plus(x, 1, term), term

    first = [jnp.asarray(scale, leaf.dtype) * leaf for leaf in b]
    return jax.lax.fori_loop(1, steps, add, (first, first))[0]


@dataclasses.dataclass(frozen=True)
class Implicit:
    """The derivative at the trained parameters, by the implicit function theorem: memory does not depend on the steps.

    Exact where training has converged, wherever it began and however it went there; so hyperparameters that only act on
    the way, such as a learning rate, have no derivative. Those that act through the validation loss alone do. Where the
    `Trainable` has `params` and `training_loss`, the gradient of that loss counts as zero at `params`, which select
    leaves of the training state. Where it has none, the last step (with its key) counts as one that does not change the
    float leaves of the state any more.

    Args:
      solver: of the linear system in the Hessian H (or in I - J, J the Jacobian of the step). "cg", conjugate
        gradients, needs H to be positive, as it is at a minimum. "normal_cg", the same for the squared system, takes
        any, but twice the products and many more steps. "neumann", the power series, needs H to be positive too, and
        learns directions of small curvature last.
      steps: of the solver, at least 1, each one product with H (two of "normal_cg").
      damping: added to the diagonal of the system, at least 0: a little steadies the solution where H is near singular.
      scale: factor in the series of "neumann", above 0 and below 2 over the largest eigenvalue; estimated with 10 more
        products if not given, 1 at the fixed point of a step.

    Raises:
      ValueError, TypeError: an argument is out of its range, or the `Trainable` has not what the solver needs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> fit = hpo.Trainable(  # ends at x = 1 / (1 + l2)
      ...     init=lambda key, h: jnp.float32(0),
      ...     step=lambda key, x, h: x - 0.3 * (x - 1 + h["l2"] * x),
      ...     evaluate=lambda x, h: x,
      ...     params=lambda x: x, training_loss=lambda x, h: ((x - 1) ** 2 + h["l2"] * x**2) / 2)
      >>> objective = hpo.unroll(fit, steps=100, adjoint=hpo.Implicit())
      >>> round(float(jax.grad(objective, 1)(jax.random.key(0), {"l2": jnp.float32(1.0)})["l2"]), 4)
      -0.25

    Reference:
      Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit differentiation.
    """

    solver: str = "cg"
    steps: int = 20
    damping: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        one_of("solver", self.solver, SOLVERS)
        whole("steps", self.steps, 1, "each is a product with the Hessian")
        real("damping", self.damping, 0, 1e30)
        if self.scale is not None:
            real("scale", self.scale, 1e-30, 1e30, "leave it out to have it estimated")

    def __call__(self, trainable: Trainable, steps: int) -> Callable:
        if (trainable.training_loss is None) and self.solver == "cg":
            raise ValueError(
                "solver='cg' needs Trainable.training_loss, whose Hessian is symmetric, and params; give them, or say "
                "solver='normal_cg' or 'neumann' for the fixed point of step"
            )
        if trainable.training_loss is not None and trainable.params is None:
            raise ValueError("Trainable has a training_loss but no params; give params=lambda train_state: ...")
        at_end = self._fixed_point if trainable.training_loss is None else self._stationary

        def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
            values, rebuild = split_floats(hparams)
            given = rebuild(jax.lax.stop_gradient(values))
            state = train(trainable, key, given, begin(trainable, key, given), 1, steps)
            floats, state_of = split_floats(state)
            state = state_of(jax.lax.stop_gradient(floats))
            state = at_end(trainable, jax.random.fold_in(key, steps), state, hparams)
            return trainable.evaluate(state, hparams)

        return objective

    def _stationary(self, trainable: Trainable, key: jax.Array, state: PyTree, hparams: PyTree) -> PyTree:
        """`state`, whose parameters move with the hyperparameters such that the training loss stays lowest."""
        del key
        assert trainable.params is not None and trainable.training_loss is not None
        training_loss, select = trainable.training_loss, trainable.params
        values, hparams_of = split_floats(hparams)
        floats, state_of = split_floats(state)
        params_of = split_floats(select(state)).rebuild
        # What selects the parameters is linear, and its transpose puts what they move by into the state.
        params, put = jax.vjp(lambda floats: split_floats(select(state_of(floats))).values, floats)

        def slope(params: Vector, values: Vector) -> Vector:
            return jax.grad(lambda p: training_loss(params_of(p), hparams_of(values)))(params)

        params = jax.lax.stop_gradient(params)
        moved = plus(self._root(slope, params, values, symmetric=True), -1, params)
        return state_of(plus(floats, 1, put(moved)[0]))

    def _fixed_point(self, trainable: Trainable, key: jax.Array, state: PyTree, hparams: PyTree) -> PyTree:
        """`state`, which moves with the hyperparameters such that a step does not change it."""
        values, hparams_of = split_floats(hparams)
        floats, state_of = split_floats(state)

        def change(floats: Vector, values: Vector) -> Vector:
            after = split_floats(trainable.step(key, state_of(floats), hparams_of(values))).values
            return [x - y.astype(x.dtype) for x, y in zip(floats, after, strict=True)]

        return state_of(self._root(change, floats, values, symmetric=False))

    def _root(self, residual: Callable, root: Vector, values: Vector, symmetric: bool) -> Vector:
        """`root` as a function of `values`, such that `residual(root, values)` stays what it is."""
        run, consts = hoist(residual, root, values)

        @jax.custom_jvp
        def at(consts: list, root: Vector, values: Vector) -> Vector:
            return root

        def rule(primals: tuple, tangents: tuple) -> tuple[Vector, Vector]:
            consts, root, values = primals
            refuse_others(tangents[0], "Implicit")
            places = [i for i, t in enumerate(tangents[2]) if not is_zero(t)]
            if not places:
                return root, [jnp.zeros_like(x) for x in root]

            def of(some: Vector) -> Vector:
                merged = list(values)
                for i, x in zip(places, some, strict=True):
                    merged[i] = x
                return run(consts, root, merged)

            _, change = jax.jvp(of, ([values[i] for i in places],), ([tangents[2][i] for i in places],))
            _, product = jax.linearize(lambda root: run(consts, root, values), root)
            matvec = lambda x: plus(product(x), self.damping, x) if self.damping else product(x)  # noqa: E731
            solve = lambda matvec, b: self._solve(matvec, b, symmetric)  # noqa: E731
            moved = jax.lax.custom_linear_solve(
                matvec, change, solve, None if symmetric else solve, symmetric=symmetric
            )
            return root, [-x for x in moved]

        at.defjvp(rule, symbolic_zeros=True)
        return at(consts, root, values)

    def _solve(self, matvec: Callable, b: Vector, symmetric: bool) -> Vector:
        if self.solver == "neumann":
            usual = 1 / largest(matvec, b) if symmetric else 1.0
            return neumann(matvec, b, self.steps, usual if self.scale is None else self.scale)
        transposed = matvec
        if self.solver == "normal_cg":
            transposed = matvec if symmetric else lambda x: jax.linear_transpose(matvec, b)(x)[0]
            squared = lambda x: transposed(matvec(x))  # noqa: E731
        else:
            squared = matvec
        rhs = transposed(b) if self.solver == "normal_cg" else b
        return cg(squared, rhs, tol=float(jnp.finfo(b[0].dtype).eps), maxiter=self.steps)[0]
