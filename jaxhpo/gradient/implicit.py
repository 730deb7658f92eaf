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
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg

from jaxhpo.checks import one_of, real, whole
from jaxhpo.gradient.exact import begin, train
from jaxhpo.gradient.floats import is_zero, refuse_others, split_floats
from jaxhpo.trainable import Trainable, hoist

PyTree = Any
SOLVERS = ("cg", "normal_cg", "neumann")
POWER_STEPS = 10


def largest(matvec: Callable, like: jax.Array) -> jax.Array:
    """float[]: about the largest eigenvalue, in size, by some products with a random vector shaped like `like`."""
    tiny = jnp.finfo(like.dtype).tiny
    start = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x), tiny)  # noqa: E731
    vector = jax.lax.fori_loop(0, POWER_STEPS, lambda _, x: matvec(unit(x)), start)
    return jnp.maximum(jnp.linalg.norm(vector), tiny)


def neumann(matvec: Callable, b: jax.Array, steps: int, scale: Any) -> jax.Array:
    """The solution of `matvec(x) = b` as some terms of scale * sum_i (1 - scale * A)^i b (Lorraine et al., eq. 8)."""

    def add(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, term = carry
        term = term - scale * matvec(term)
        return x + term, term

    return jax.lax.fori_loop(1, steps, add, (scale * b, scale * b))[0]


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
        params, params_of = split_floats(select(state))
        flat, unravel = ravel_pytree(params)

        def slope(flat: jax.Array, values: list[jax.Array]) -> jax.Array:
            return jax.grad(lambda x: training_loss(params_of(unravel(x)), hparams_of(values)))(flat)

        moved = unravel(self._root(slope, flat, values, symmetric=True) - flat)
        # What selects the parameters is linear, and its transpose puts what they move by into the state.
        _, put = jax.vjp(lambda floats: split_floats(select(state_of(floats))).values, floats)
        return state_of([x + dx for x, dx in zip(floats, put(moved)[0], strict=True)])

    def _fixed_point(self, trainable: Trainable, key: jax.Array, state: PyTree, hparams: PyTree) -> PyTree:
        """`state`, which moves with the hyperparameters such that a step does not change it."""
        values, hparams_of = split_floats(hparams)
        floats, state_of = split_floats(state)
        flat, unravel = ravel_pytree(floats)

        def change(flat: jax.Array, values: list[jax.Array]) -> jax.Array:
            after = trainable.step(key, state_of(unravel(flat)), hparams_of(values))
            return flat - ravel_pytree(split_floats(after).values)[0].astype(flat.dtype)

        return state_of(unravel(self._root(change, flat, values, symmetric=False)))

    def _root(self, residual: Callable, root: jax.Array, values: list[jax.Array], symmetric: bool) -> jax.Array:
        """`root`, float[n], as a function of `values`, such that `residual(root, values)` stays what it is."""
        run, consts = hoist(residual, root, values)

        @jax.custom_jvp
        def at(consts: list, root: jax.Array, values: list[jax.Array]) -> jax.Array:
            return root

        def rule(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
            consts, root, values = primals
            refuse_others(tangents[0], "Implicit")
            places = [i for i, t in enumerate(tangents[2]) if not is_zero(t)]
            if not places:
                return root, jnp.zeros_like(root)

            def of(some: list[jax.Array]) -> jax.Array:
                merged = list(values)
                for i, x in zip(places, some, strict=True):
                    merged[i] = x
                return run(consts, root, merged)

            _, change = jax.jvp(of, ([values[i] for i in places],), ([tangents[2][i] for i in places],))
            _, product = jax.linearize(lambda root: run(consts, root, values), root)
            matvec = lambda x: product(x) + self.damping * x if self.damping else product(x)  # noqa: E731
            solve = lambda matvec, b: self._solve(matvec, b, symmetric)  # noqa: E731
            transposed = None if symmetric else solve
            return root, -jax.lax.custom_linear_solve(matvec, change, solve, transposed, symmetric=symmetric)

        at.defjvp(rule, symbolic_zeros=True)
        return at(consts, root, values)

    def _solve(self, matvec: Callable, b: jax.Array, symmetric: bool) -> jax.Array:
        if self.solver == "neumann":
            usual = 1 / largest(matvec, b) if symmetric else 1.0
            return neumann(matvec, b, self.steps, usual if self.scale is None else self.scale)
        options: dict[str, Any] = {"tol": float(jnp.finfo(b.dtype).eps), "maxiter": self.steps}
        if self.solver == "cg":
            return cg(matvec, b, **options)[0]
        transposed = matvec if symmetric else lambda x: jax.linear_transpose(matvec, b)(x)[0]
        return cg(lambda x: transposed(matvec(x)), transposed(b), **options)[0]
