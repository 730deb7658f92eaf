"""Hyperband or ASHA: who is stopped when, whoever chooses the configurations."""

from collections.abc import Callable

from jaxhpo.bandit.promotion import promotion
from jaxhpo.bandit.race import levels_of, race
from jaxhpo.bandit.sampling import Sampling
from jaxhpo.bandit.schedule import Bracket, hyperband_brackets
from jaxhpo.checks import one_of, whole
from jaxhpo.method import Method, PyTree
from jaxhpo.space import Space

SCHEDULERS = ("asha", "hyperband")
LEAST_PAUSED = 16


def read_brackets(max_steps: int, eta: int, min_steps: int, cycles: int) -> tuple[Bracket, ...]:
    """The brackets of some cycles of Hyperband.

    Raises:
      ValueError, TypeError: a number is out of its range.
    """
    max_steps, eta = whole("max_steps", max_steps, 1, most=2**31 - 1), whole("eta", eta, 2)
    min_steps, cycles = _at_most(max_steps, min_steps), whole("cycles", cycles, 1)
    return hyperband_brackets(max_steps, eta, min_steps) * cycles


def read_rungs(max_steps: int, eta: int, min_steps: int) -> tuple[int, ...]:
    """The steps at which ASHA compares trials.

    Raises:
      ValueError, TypeError: a number is out of its range.
    """
    max_steps, eta = whole("max_steps", max_steps, 1, most=2**31 - 1), whole("eta", eta, 2)
    rungs = [_at_most(max_steps, min_steps)]
    while rungs[-1] * eta < max_steps:
        rungs.append(rungs[-1] * eta)
    return (*rungs, max_steps) if rungs[-1] < max_steps else tuple(rungs)


def _at_most(max_steps: int, min_steps: int) -> int:
    if whole("min_steps", min_steps, 1) > max_steps:
        raise ValueError(f"min_steps must be at most max_steps={max_steps}, got {min_steps}; lower it")
    return int(min_steps)


def scheduled(
    name: str,
    scheduler: str,
    space: Space,
    sampling: Callable[[int], Sampling],
    settings: PyTree,
    *,
    max_steps: int,
    eta: int,
    min_steps: int,
    batch: int,
    cycles: int = 1,
    in_flight: int | None = None,
    paused: int | None = None,
) -> Method:
    """A `Method` of this name.

    Args:
      name: as in `hpo.asha`.
      scheduler: "asha" or "hyperband".
      space: what is searched.
      sampling: of the number of levels at which trials are compared, who chooses the configurations.
      settings: of who does.
      max_steps, eta, min_steps, batch, cycles, in_flight, paused: as in `asha` and `hyperband`.

    Raises:
      ValueError, TypeError: an argument is out of its range.
    """
    if one_of("scheduler", scheduler, SCHEDULERS) == "asha":
        rungs = read_rungs(max_steps, eta, min_steps)
        room = max(batch, LEAST_PAUSED) if paused is None else whole("paused", paused, 0, "0 is to keep none")
        chooses = sampling(len(rungs))
        return promotion(name, space, rungs, eta, batch=batch, paused=room, sampling=chooses, settings=settings)
    brackets = read_brackets(max_steps, eta, min_steps, cycles)
    flying = len(brackets) if in_flight is None else min(whole("in_flight", in_flight, 1), len(brackets))
    chooses = sampling(len(levels_of(brackets)))
    return race(name, space, brackets, batch=batch, in_flight=flying, sampling=chooses, settings=settings)
