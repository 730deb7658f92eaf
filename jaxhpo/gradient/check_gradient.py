"""Whether a gradient is right: differences of the objective along random directions, and what they cannot say.

Central differences at a ladder of steps, each rung a quarter of the one before, with one extrapolation (Richardson).
How far neighbouring rungs are apart, and rounding, tell how much a difference can be trusted (Ridders 1982, Accurate
computation of F'(x) and F'(x) F''(x)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxhpo.checks import real, whole
from jaxhpo.gradient.exact import Truncated
from jaxhpo.gradient.floats import split_floats
from jaxhpo.gradient.implicit import Implicit
from jaxhpo.gradient.online import Online
from jaxhpo.gradient.path import NonFinite, Path, as_arrays, look_along, look_back
from jaxhpo.gradient.tangents import Line
from jaxhpo.gradient.unroll import Unrolled
from jaxhpo.trainable import Trainable

PyTree = Any

FIRST_STEP = 2.0**-4
TRUSTED = 0.05  # of a slope: how far off a difference may be to say that a gradient agrees
AGREES, AGREES_WIDE = 1e-2, 1e-4  # relative errors in float32 and float64: a ReLU bends within the smallest step
EXPLODES = 1e3  # growth over the last half of a run
SAYINGS = {
    "agrees": "the gradient agrees with finite differences",
    "disagrees": "the gradient disagrees with finite differences",
    "too noisy": "finite differences are too noisy to judge the gradient",
    "not smooth": "the objective is not smooth here: its slopes on both sides of the point differ",
    "explodes": "the derivative grows so fast along the training that it holds at this very point only",
    "flat": "the objective is flat here, and so is the gradient",
    "not finite": "the loss or its gradient is not finite",
}


class GradientCheck(NamedTuple):
    """What `check_gradient` found; `print` it."""

    ok: bool
    """whether the gradient agrees, and can be used"""
    verdict: str
    """"agrees", "disagrees", "too noisy", "not smooth", "explodes", "flat" or "not finite" """
    loss: float
    slopes: np.ndarray
    """float[directions]: by the adjoint, for a relative change of the hyperparameters"""
    differences: np.ndarray
    """float[directions]: by finite differences"""
    errors: np.ndarray
    """float[directions]: how far the two are apart, relative to the slope"""
    uncertainty: np.ndarray
    """float[directions]: how far the differences may be off, relative to the slope"""
    gradient: PyTree
    """shaped like `hparams`, `None` at what is no float"""
    norm: float
    """of the gradient"""
    path: Path | None
    """along the training of an unrolled objective"""
    culprit: NonFinite | None
    """the first number of the training that is not finite"""
    advice: tuple[str, ...]
    """what to do"""

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {SAYINGS[self.verdict]}", f"  loss {self.loss:.6g}, gradient norm {self.norm:.3g}"]
        if self.path is not None:
            lines[-1] += f", state derivative grew {self.path.growth:.3g}x over the last half of the steps"
        if self.culprit is not None:
            lines.append(f"  {self.culprit}")
        lines.append("  slope by adjoint   by differences    apart   trusted to")
        for slope, difference, error, unsure in zip(
            self.slopes, self.differences, self.errors, self.uncertainty, strict=True
        ):
            lines.append(f"  {slope:16.8g} {difference:16.8g} {error:8.1e}     {unsure:8.1e}")
        return "\n".join(lines + [f"  {line}" for line in self.advice])


class _Ladder(NamedTuple):
    """Differences along one direction."""

    slope: float
    unsure: float
    kinked: bool


def _ladder(steps: np.ndarray, above: np.ndarray, below: np.ndarray, middle: float, rounding: float) -> _Ladder:
    """The slope by differences; float[rungs] each, `rounding` is how far off a loss may be."""
    with np.errstate(all="ignore"):
        central = (above - below) / (2 * steps)
        better = (16 * central[1:] - central[:-1]) / 15
        noise = rounding / steps[2:]
        spread = np.maximum(np.abs(np.diff(better)), noise)
        gap = np.abs(above - 2 * middle + below) / steps
    spread = np.where(np.isfinite(spread), spread, np.inf)
    i = int(np.argmin(spread))
    # At a kink the two sides stay apart by the same, where a smooth function's come together with the step.
    same = np.abs(gap[1:] - gap[:-1]) < 0.3 * gap[1:]
    kinked = bool(np.any(same & (gap[1:] > 10 * rounding / steps[1:]) & (gap[1:] > TRUSTED * np.abs(central[1:]))))
    return _Ladder(float(better[i + 1]), float(spread[i]), kinked)


def _verdict(slopes: np.ndarray, ladders: list[_Ladder], size: float, tolerance: float) -> tuple[str, np.ndarray]:
    """The verdict and the scale, float[directions], to which errors are relative."""
    differences, unsure = (np.array([getattr(x, name) for x in ladders]) for name in ("slope", "unsure"))
    scale = np.maximum(np.maximum(np.abs(slopes), np.abs(differences)), 0.1 * size)
    apart = np.abs(slopes - differences)
    if not np.all(np.isfinite(slopes)) or not np.all(np.isfinite(differences)):
        return "not finite", scale
    if not scale.any():
        return "flat", np.ones_like(scale)
    agrees = (apart <= np.maximum(tolerance * scale, 3 * unsure)) & (unsure <= TRUSTED * scale)
    if agrees.all():
        return "agrees", scale
    if any(x.kinked for x, fine in zip(ladders, agrees, strict=True) if not fine):
        return "not smooth", scale
    return ("disagrees" if np.any(apart > np.maximum(tolerance * scale, 10 * unsure)) else "too noisy"), scale


def _advice(verdict: str, objective: Any, path: Path | None, culprit: NonFinite | None, still: bool) -> list[str]:
    advice = []
    adjoint = getattr(objective, "adjoint", None)
    if culprit is not None and culprit.what == "value":
        advice.append("Training itself fails: lower the learning rate, or look for log(0) and divisions by 0.")
    elif culprit is not None and culprit.what == "tangent":
        advice.append(
            "Training is finite, its derivative is not: that of sqrt at 0 is infinite. Give Adam an eps_root, as in "
            "optax.adam(lr, eps_root=1e-8), and norms an epsilon inside the root."
        )
    elif culprit is not None:
        advice.append(
            "The derivative is finite forward but not backward: a jnp.where hides a value, not its derivative; make "
            "its argument finite too, or use Forward()."
        )
    elif path is not None and path.growth > EXPLODES:
        advice.append(
            "The hypergradient explodes: train for fewer steps, use Truncated(k), or lower the learning rate."
        )
    if verdict == "disagrees" and isinstance(adjoint, Truncated) and adjoint.k < objective.steps:
        advice.append(
            f"Truncated({adjoint.k}) leaves out the first steps, so it differs by design; Reverse() does not."
        )
    if verdict == "disagrees" and isinstance(adjoint, Implicit):
        advice.append(
            "Implicit is exact only where training has converged, and sees no hyperparameter that acts on the way "
            "alone, such as a learning rate: train longer, give its solver more steps, or use Reverse()."
        )
    if verdict in ("disagrees", "not smooth") and isinstance(adjoint, Online):
        advice.append("Online holds its moves, which finite differences do not; to judge it, let no window end.")
    if still and verdict in ("disagrees", "too noisy"):
        advice.append("The loss moves but its gradient is 0: it goes by steps, as an accuracy; evaluate a smooth loss.")
    elif verdict == "too noisy":
        advice.append("Check it in float64 (jax.enable_x64), or shorten the training.")
    if verdict == "flat":
        advice.append("Either no hyperparameter acts on it, or it counts, as an accuracy does: evaluate a smooth loss.")
    return advice


def check_gradient(
    objective: Callable,
    hparams: PyTree,
    *,
    key: jax.Array | None = None,
    directions: int = 3,
    eps: float = FIRST_STEP,
) -> GradientCheck:
    """Judges the gradient of an objective by finite differences, and looks along its training for what goes wrong.

    Costs 10 evaluations for each direction in float32, 14 in float64, one gradient, and for unrolled training one more
    run with a derivative.

    Args:
      objective: `(key, hparams) -> loss`; of one that `unroll` made the training steps are looked at, too.
      hparams: pytree of one trial. Its floats, Python's too, are what the gradient is with respect to.
      key: the trial's; `jax.random.key(0)` if not given.
      directions: random directions, at least 1, each a relative change of every float between a half and one.
      eps: the largest step along them, in (0, 0.5]; four (in float64, six) more are each a quarter of the one before.

    Returns:
      A `GradientCheck`; printed, it is a verdict with its figures and what to do.

    Raises:
      TypeError, ValueError: there is no float in `hparams`, or an argument is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> check = hpo.check_gradient(lambda key, h: jnp.sin(h["x"]) * h["y"], {"x": 1.0, "y": 2.0})
      >>> check.ok, str(check).splitlines()[0]
      (True, 'agrees: the gradient agrees with finite differences')

    Reference:
      Ridders (1982), Accurate computation of F'(x) and F'(x) F''(x).
    """
    if not callable(objective) or isinstance(objective, Trainable):
        raise TypeError(
            f"objective must be a function (key, hparams) -> loss, got {type(objective).__name__}; of training, say "
            "hpo.unroll(trainable, steps=...)"
        )
    directions = whole("directions", directions, 1)
    real("eps", eps, 1e-12, 0.5, "it is relative to each hyperparameter")
    key = jax.random.key(0) if key is None else key
    hparams = as_arrays(hparams)
    values, rebuild = split_floats(hparams)
    if not values:
        raise TypeError(f"hparams must have a float to differentiate with respect to, got {hparams!r}")
    flat, unravel = ravel_pytree(values)
    of = lambda x: jnp.asarray(objective(key, rebuild(unravel(x))))  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(of))(flat)

    random = np.random.default_rng(0)
    x, g = np.asarray(flat, np.float64), np.asarray(gradient, np.float64)
    sizes = np.where(x == 0, 1, np.abs(x))
    along = sizes * random.uniform(0.5, 1, (directions, x.size)) * random.choice([-1, 1], (directions, x.size))
    wide = flat.dtype == jnp.float64
    steps = eps * 0.25 ** np.arange(7 if wide else 5)
    moves = along[:, None, None, :] * np.array([1, -1])[None, :, None, None] * steps[None, None, :, None]
    points = jnp.asarray(x + moves, flat.dtype).reshape(-1, x.size)
    around = np.asarray(jax.jit(lambda points: jax.lax.map(of, points))(points), np.float64)
    above, below = np.moveaxis(around.reshape(directions, 2, len(steps)), 1, 0)

    size = float(np.sqrt(np.sum((g * sizes) ** 2)))
    rounding = 4 * float(jnp.finfo(flat.dtype).eps) * (abs(float(loss)) + float(np.sum(np.abs(g * sizes))))
    ladders = [_ladder(steps, a, b, float(loss), rounding) for a, b in zip(above, below, strict=True)]
    slopes = along @ g
    verdict, scale = _verdict(slopes, ladders, size, AGREES_WIDE if wide else AGREES)

    path = culprit = None
    if isinstance(objective, Unrolled):
        line = Line(lambda at: rebuild(unravel(at)), flat, jnp.asarray(along[:1], flat.dtype))
        path = look_along(objective, key, line)
        culprit = path.value or path.tangent
        if culprit is None and not np.all(np.isfinite(g)):
            culprit = look_back(objective, key, hparams)
    if culprit is not None and verdict != "agrees":
        verdict = "not finite"
    elif path is not None and path.growth > EXPLODES and verdict in ("disagrees", "too noisy"):
        verdict = "explodes"
    differences = np.array([ladder.slope for ladder in ladders])
    return GradientCheck(
        ok=verdict == "agrees",
        verdict=verdict,
        loss=float(loss),
        slopes=slopes,
        differences=differences,
        errors=np.abs(slopes - differences) / scale,
        uncertainty=np.array([ladder.unsure for ladder in ladders]) / scale,
        gradient=_as_tree(hparams, unravel(gradient)),
        norm=float(np.linalg.norm(g)),
        path=path,
        culprit=culprit,
        advice=tuple(_advice(verdict, objective, path, culprit, not g.any())),
    )


def _as_tree(hparams: PyTree, gradient: list[jax.Array]) -> PyTree:
    """A gradient in the shape of `hparams`, `None` at what is no float."""
    slopes = iter(gradient)
    is_float = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: next(slopes) if is_float(x) else None, hparams)
