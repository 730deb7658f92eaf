"""Who trains in which lane, round by round: the static schedule of a race between brackets of trials.

A bracket is a ladder of rungs: `members` trials train up to `steps` steps in all, the best of them go on to the next
rung. How many move up is known beforehand, only who is not, so the whole timetable is a NumPy table made before the
study. A round runs the same number of steps in every lane, so the brackets are interleaved: a list schedule with
preemption, whose priorities are the best of a few dozen seeded tries.

Reference: Li et al. (2018), Hyperband: a novel bandit-based approach to hyperparameter optimization, JMLR 18(185),
Algorithm 1 and Table 1.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rung(NamedTuple):
    """One rung of a bracket."""

    members: int
    """trials that train in it"""
    steps: int
    """training steps that each has behind it at its end"""


Bracket = tuple[Rung, ...]


class Timetable(NamedTuple):
    """Who trains in which lane; row `r` of every array is round `r`."""

    bracket: np.ndarray
    """i32[rounds, batch]: whose trial the lane trains, -1 is padding; padding comes last"""
    rung: np.ndarray
    """i32[rounds, batch]: the rung that the trial is in"""
    member: np.ndarray
    """i32[rounds, batch]: which of the rung's members, in the first rung by age, later by the loss they came with"""
    trial: np.ndarray
    """i32[rounds, batch]: in a first rung, the trial's number in the order of their starts; else -1"""
    fresh: np.ndarray
    """bool[rounds, batch]: whether training starts here"""
    ends: np.ndarray
    """bool[rounds, batch]: whether the trial has done all steps of the rung when the round is over"""
    steps: np.ndarray
    """i32[rounds]: training steps of every lane in the round"""
    standing: np.ndarray
    """i32[rounds, brackets]: the rung that each bracket is in, -1 is a bracket not in flight"""


class Schedule(NamedTuple):
    """A race, planned."""

    table: Timetable
    slots: int
    """training states that have to be kept at most"""

    @property
    def rounds(self) -> int:
        """Rounds until the race is over."""
        return len(self.table.steps)

    @property
    def steps(self) -> int:
        """Training steps of a lane, all rounds together."""
        return int(self.table.steps.sum())

    @property
    def utilisation(self) -> float:
        """Share of the lane-steps that train something."""
        busy = (self.table.bracket >= 0).sum(1) @ self.table.steps.astype(np.int64)
        return float(busy / (self.table.bracket.shape[1] * self.steps))


def halving(members: int, steps: int, max_steps: int, eta: int) -> Bracket:
    """The rungs of a successive halving of `members` trials that starts at `steps` training steps."""
    rungs = [Rung(members, steps)]
    while rungs[-1].steps < max_steps and rungs[-1].members >= eta:
        rungs.append(Rung(rungs[-1].members // eta, min(rungs[-1].steps * eta, max_steps)))
    return tuple(rungs[:-1]) + (Rung(rungs[-1].members, max_steps),)


def hyperband_brackets(max_steps: int, eta: int, min_steps: int) -> tuple[Bracket, ...]:
    """The brackets of one Hyperband cycle, the most eager to stop first.

    Bracket `s` starts `floor((s_max + 1) / (s + 1)) * eta**s` trials at `max_steps / eta**s` steps, as in Table 1.
    """
    deepest = 0
    while max_steps >= min_steps * eta ** (deepest + 1):
        deepest += 1

    def bracket(s: int) -> Bracket:
        members = (deepest + 1) // (s + 1) * eta**s
        return tuple(Rung(members // eta**i, max_steps // eta ** (s - i)) for i in range(s + 1))

    return tuple(bracket(s) for s in range(deepest, -1, -1))


def kept(bracket: Bracket, rung: int) -> int:
    """How many trials of a rung move up."""
    return bracket[rung + 1].members if rung + 1 < len(bracket) else 0


def stretch(bracket: Bracket, rung: int) -> int:
    """Training steps of a rung, those of the rungs below not counted."""
    return bracket[rung].steps - (bracket[rung - 1].steps if rung else 0)


class _Group(NamedTuple):
    """Members of a bracket's present rung that have equally many steps left."""

    left: int
    members: np.ndarray


class _Race:
    """The brackets in flight while a schedule is drawn up: who has how many steps left in the present rung."""

    def __init__(self, brackets: Sequence[Bracket], batch: int, in_flight: int):
        self.brackets, self.batch, self.in_flight = brackets, batch, in_flight
        self.waiting = list(range(len(brackets)))[::-1]
        self.standing = np.full(len(brackets), -1, np.int32)
        self.open: dict[int, list[_Group]] = {}
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.open) < self.in_flight:
            self._enter(self.waiting.pop(), 0)

    def _enter(self, b: int, rung: int) -> None:
        self.standing[b] = rung
        self.open[b] = [_Group(self.whole(b), np.arange(self.brackets[b][rung].members))]

    def whole(self, b: int) -> int:
        """Steps that a trial trains in the bracket's present rung."""
        return stretch(self.brackets[b], self.standing[b])

    def chain(self, b: int) -> int:
        """Steps until the bracket can end: waves of the present rung that wait for lanes, and the rungs above."""
        waves = math.ceil(sum(len(g.members) for g in self.open[b]) / self.batch) - 1
        return waves * self.whole(b) + self.brackets[b][-1].steps - self.brackets[b][self.standing[b]].steps

    def select(self, bonus: np.ndarray, hold: bool) -> list[tuple[int, _Group]]:
        """Who gets a lane: the longest chains first; with `hold`, before them who began in a first rung."""
        queue = []
        for b, groups in self.open.items():
            chain, whole, bottom = self.chain(b) + bonus[b], self.whole(b), self.standing[b] == 0
            queue += [((hold and bottom and g.left < whole, g.left + chain), b, g) for g in groups]
        queue.sort(key=lambda item: item[0], reverse=True)
        chosen, lanes = [], self.batch
        for _, b, group in queue:
            if lanes:
                chosen.append((b, _Group(group.left, group.members[:lanes])))
                lanes -= len(chosen[-1][1].members)
        return chosen

    def held(self, chosen: list[tuple[int, _Group]]) -> int:
        """Training states that are kept while the chosen ones train."""
        states = 0
        for b, groups in self.open.items():
            rung, waiting = self.standing[b], sum(len(g.members) for g in groups)
            states += min(self.brackets[b][rung].members - waiting, kept(self.brackets[b], rung)) + waiting
            if rung == 0:
                states -= sum(len(g.members) for g in groups if g.left == self.whole(b))
        return states + sum(len(g.members) for b, g in chosen if self.standing[b] == 0 and g.left == self.whole(b))

    def advance(self, chosen: list[tuple[int, _Group]], steps: int) -> None:
        """Trains the chosen ones; a bracket whose rung is done moves up, or makes room for the next one."""
        for b in {b for b, _ in chosen}:
            left = {g.left: g.members for g in self.open[b]}
            for g in (g for owner, g in chosen if owner == b):
                left[g.left] = left[g.left][len(g.members) :]
            for g in (g for owner, g in chosen if owner == b):
                left[g.left - steps] = np.concatenate([left.get(g.left - steps, g.members[:0]), g.members])
            self.open[b] = [_Group(n, members) for n, members in left.items() if n and len(members)]
            if not self.open[b]:
                del self.open[b]
                if self.standing[b] + 1 < len(self.brackets[b]):
                    self._enter(b, self.standing[b] + 1)
                else:
                    self.standing[b] = -1
        self._admit()


def _draw(brackets: Sequence[Bracket], batch: int, in_flight: int, bonus: np.ndarray, hold: bool) -> Schedule:
    race = _Race(brackets, batch, in_flight)
    rows, lengths, standing, slots, started = [], [], [], 0, 0
    number = [np.full(b[0].members, -1) for b in brackets]
    while race.open:
        chosen = race.select(bonus, hold)
        steps = min(g.left for _, g in chosen)
        parts = []
        for b, (left, members) in chosen:
            rung = race.standing[b]
            fresh = rung == 0 and left == race.whole(b)
            if fresh:
                number[b][members] = started + np.arange(len(members))
                started += len(members)
            trial = number[b][members] if rung == 0 else np.full(len(members), -1)
            same = np.broadcast_to(np.array([[b], [rung], [fresh], [left == steps]]), (4, len(members)))
            parts.append(np.concatenate([same, [members, trial]]))
        row = np.concatenate(parts, axis=1)
        rows.append(np.pad(row, ((0, 0), (0, batch - row.shape[1])), constant_values=-1))
        lengths.append(steps)
        standing.append(race.standing.copy())
        slots = max(slots, race.held(chosen))
        race.advance(chosen, steps)
    bracket, rung, fresh, ends, member, trial = np.moveaxis(np.stack(rows).astype(np.int32), 1, 0)
    quanta = np.array(lengths, np.int32)
    return Schedule(Timetable(bracket, rung, member, trial, fresh == 1, ends == 1, quanta, np.stack(standing)), slots)


@functools.lru_cache(maxsize=256)
def schedule(brackets: tuple[Bracket, ...], batch: int, in_flight: int) -> Schedule:
    """The timetable of a race between brackets.

    Args:
      brackets: in the order in which they come into flight.
      batch: lanes.
      in_flight: brackets that run at the same time, at most.

    Returns:
      A schedule that keeps at most `batch` training states and, for the `in_flight` brackets with the most trials,
      those that leave the first rung.
    """
    bound = batch + sum(sorted((kept(b, 0) for b in brackets), reverse=True)[:in_flight])
    rng = np.random.default_rng(0)
    horizon = brackets[0][-1].steps
    work = sum(rung.members * stretch(b, i) for b in brackets for i, rung in enumerate(b))
    ideal = max(horizon, work / batch)
    best = _draw(brackets, batch, in_flight, np.zeros(len(brackets)), hold=True)
    tries = min(48, 250_000 // (best.rounds * len(brackets))) if len(brackets) > 1 else 0
    for i in range(tries):
        if best.steps <= 1.01 * ideal:
            break
        bonus = horizon * rng.choice([0.0, 0.0, 0.02, 0.05, 0.1, -0.02, -0.05], len(brackets))
        drawn = _draw(brackets, batch, in_flight, bonus, hold=i % 2 == 1)
        if drawn.slots <= bound and drawn.steps < best.steps:
            best = drawn
    return best
