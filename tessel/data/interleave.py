"""Which dataset of a blend comes next: Megatron's greedy rule for many steps side by side.

At step i, the dataset with the largest error weight * max(i, 1) - taken comes next, in float64, the first
of equals (megatron-core's helpers.cpp). Each choice depends on all before it, so the steps are cut into
parts that run side by side, each from a guessed state: the rule corrects itself, and after some steps the
guess is forgotten. A part is kept only if it began in the very state in which the part before it ended;
the others run again from that state. What is returned is thus what step after step would give.

Within a part, errors are carried along in float32, which tells the largest one for all but some steps;
where others come near it, their errors are computed in float64 as the rule has it. Datasets of equal
weight take turns in their order, so they are carried along as one class.
Legend: D datasets, C classes, P parts, S steps, U parts that are unsure.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Errors of parts that run side by side: as many as stay in a processor's cache.
_STATE_ENTRIES = 1 << 17
_MAX_PARTS = 1 << 13
_LANES = 16  # rows of whole vector registers
_MIN_PART_STEPS = 512
# Steps that a part takes before its own, to forget its guessed start.
_MIN_WARM_STEPS = 64
_WARM_STEPS_PER_CLASS = 8
# Steps before the first part: in the beginning, errors are no guide.
_FIRST_STEPS = 64
# After so many steps, the float32 errors are made anew from float64, and the choices written down.
_BLOCK_STEPS = 32
# float32 errors closer than this are compared in float64. Errors lie above -1 and below the largest; two of
# them, after 32 additions and 32 subtractions, are off by less than 2^-16 + 2^-17 where the largest is below 2.
_NEAR = 3e-5
_NEAR_RELATIVE = 2.0**-15
# Runs from a first guess, to learn at which errors datasets are taken.
_PILOT_PARTS = 256
_PILOT_BLOCKS = 8
# So few parts are as fast one after the other, step by step.
_FEW_PARTS = 6


def interleave(weights: np.ndarray, size: int, limits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """i16[size] the dataset of each step, and i64[size] how often it was taken before.

    `weights` f64[D] sum to 1; `limits` f64[D] is the most of each, whose sum is at least `size`, and equal
    where weights are.
    """
    rule = _Rule(weights, limits)
    datasets, samples = np.empty(size, np.int16), np.empty(size, np.int64)
    num_parts = min(_MAX_PARTS, _STATE_ENTRIES // rule.num_classes, (size - _FIRST_STEPS) // _MIN_PART_STEPS)
    num_parts = num_parts // _LANES * _LANES or num_parts
    num_first = size if num_parts < 2 else _FIRST_STEPS + (size - _FIRST_STEPS) % num_parts
    taken_C = rule.step_by_step(np.zeros(rule.num_classes), 0, datasets[:num_first], samples[:num_first])
    if num_first < size:
        parts = datasets[num_first:].reshape(num_parts, -1), samples[num_first:].reshape(num_parts, -1)
        _fill(rule, taken_C, num_first, *parts)
    return datasets, samples


def _fill(rule: _Rule, taken_C: np.ndarray, first_step: int, datasets_PS: np.ndarray, samples_PS: np.ndarray) -> None:
    """The choices from `first_step` on, when `taken_C` have been taken, in parts of equal length."""
    num_parts, part_steps = datasets_PS.shape
    starts_P = first_step + np.arange(num_parts) * part_steps
    warm_steps = min(part_steps, max(_MIN_WARM_STEPS, _WARM_STEPS_PER_CLASS * rule.num_classes))
    warm_starts_P = np.maximum(starts_P - warm_steps, 1)
    begun_CP = rule.run(rule.guess(warm_starts_P, _pilot(rule, warm_starts_P)), warm_starts_P, warm_steps)
    begun_CP[:, 0] = taken_C
    ended_CP = _run_halves(rule, begun_CP, starts_P, datasets_PS, samples_PS)
    while True:
        todo = np.flatnonzero((begun_CP[:, 1:] != ended_CP[:, :-1]).any(axis=0)) + 1
        if not len(todo):
            return
        if len(todo) <= _FEW_PARTS:
            _mend(rule, begun_CP, ended_CP, starts_P, datasets_PS, samples_PS, int(todo[0]))
            continue
        begun_CP[:, todo] = ended_CP[:, todo - 1]
        some_datasets, some_samples = datasets_PS[todo], samples_PS[todo]
        ended_CP[:, todo] = rule.run(begun_CP[:, todo], starts_P[todo], part_steps, some_datasets, some_samples)
        datasets_PS[todo], samples_PS[todo] = some_datasets, some_samples


def _run_halves(
    rule: _Rule, begun_CP: np.ndarray, starts_P: np.ndarray, datasets_PS: np.ndarray, samples_PS: np.ndarray
) -> np.ndarray:
    """All steps of all parts, by two threads: what has been taken in the end."""
    middle = len(starts_P) // 2 // _LANES * _LANES

    def half(which: slice) -> np.ndarray:
        datasets, samples = datasets_PS[which], samples_PS[which]
        return rule.run(begun_CP[:, which], starts_P[which], datasets.shape[1], datasets, samples)

    with ThreadPoolExecutor(2, "blend") as pool:
        return np.concatenate(list(pool.map(half, (slice(0, middle), slice(middle, None)))), axis=1)


def _pilot(rule: _Rule, starts_P: np.ndarray) -> np.ndarray:
    """f64[D]: the thresholds that some steps of some parts show."""
    some_P = starts_P[:: -(-len(starts_P) // _PILOT_PARTS)]
    parts = _Parts(rule, rule.guess(some_P), some_P)
    seen = []
    for _ in range(_PILOT_BLOCKS):
        parts.advance(_BLOCK_STEPS)
        seen.append(parts.largest_SP.copy())
        parts.renew()
    return rule.thresholds(np.concatenate(seen[_PILOT_BLOCKS // 2 :]))


def _mend(
    rule: _Rule,
    begun_CP: np.ndarray,
    ended_CP: np.ndarray,
    starts_P: np.ndarray,
    datasets_PS: np.ndarray,
    samples_PS: np.ndarray,
    part: int,
) -> None:
    """Parts from `part` on again, one after the other, until one begins as it did."""
    while part < len(starts_P) and (begun_CP[:, part] != ended_CP[:, part - 1]).any():
        begun_CP[:, part] = ended_CP[:, part - 1]
        start = int(starts_P[part])
        ended_CP[:, part] = rule.step_by_step(begun_CP[:, part], start, datasets_PS[part], samples_PS[part])
        part += 1


class _Rule:
    """The greedy rule for given weights and limits.

    What has been taken of a class of m members is one number k: member k % m comes next, and has given k // m.
    """

    def __init__(self, weights: np.ndarray, limits: np.ndarray | None) -> None:
        self._all_weights, self._all_limits = weights, limits
        self.num_datasets = len(weights)
        self.weights, firsts, self._class_of, self.sizes = np.unique(
            weights, return_index=True, return_inverse=True, return_counts=True
        )
        sizes = self.sizes
        self.num_classes = len(sizes)
        self.limits = None if limits is None else limits[firsts]
        self.are_single = bool((sizes == 1).all())
        order = np.argsort(self._class_of, kind="stable")
        # [class * widest + k]: the k-th member of a class.
        self._widest = int(sizes.max())
        self._members = np.zeros(self.num_classes * self._widest, np.int64)
        self._places = np.arange(len(weights)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._members[self._class_of[order] * self._widest + self._places] = order
        self._place_of = np.empty(len(weights), np.int64)
        self._place_of[order] = self._places
        code_type = np.uint8 if self.num_classes < 256 else np.uint16
        self.codes_C1 = np.arange(1, self.num_classes + 1, dtype=code_type)[:, None]

    def step_by_step(self, taken_C: np.ndarray, start: int, datasets: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The rule itself from step `start` on, into `datasets` and `samples`; returns what has been taken then."""
        taken = (taken_C // self.sizes)[self._class_of] + (self._place_of < (taken_C % self.sizes)[self._class_of])
        for i in range(len(datasets)):
            errors = self._all_weights * float(max(start + i, 1)) - taken
            if self._all_limits is not None:
                errors[taken >= self._all_limits] = -np.inf
            choice = int(errors.argmax())
            datasets[i], samples[i] = choice, taken[choice]
            taken[choice] += 1
        return np.bincount(self._class_of, weights=taken, minlength=self.num_classes)

    def guess(self, steps_P: np.ndarray, threshold_D: np.ndarray | float = 0.5) -> np.ndarray:
        """f64[C, P]: how many of each class have probably been taken before each step; they sum to it.

        A dataset is thought to be taken whenever its error passes its threshold; what is then missing, or too
        much, is made up by those that will pass, or have passed, theirs within the fewest steps.
        """
        weights_D1 = self._all_weights[:, None]
        steps_DP = (weights_D1 * steps_P - np.reshape(threshold_D, (-1, 1))) / weights_D1
        taken_DP = np.maximum(np.ceil(steps_DP * weights_D1), 0)
        if self._all_limits is not None:
            np.minimum(taken_DP, self._all_limits[:, None], out=taken_DP)
        missing_P = steps_P - taken_DP.sum(axis=0).round().astype(np.int64)
        # Steps to the next passing, and since the last.
        ahead_DP = taken_DP / weights_D1 - steps_DP
        behind_DP = 1 / weights_D1 - ahead_DP
        if self._all_limits is not None:
            ahead_DP[taken_DP >= self._all_limits[:, None]] = np.inf
        behind_DP[taken_DP <= 0] = np.inf
        taken_DP += _ranks(ahead_DP) < missing_P
        taken_DP -= _ranks(behind_DP) < -missing_P
        order = np.argsort(self._class_of, kind="stable")
        return np.add.reduceat(taken_DP[order], np.cumsum(self.sizes) - self.sizes, axis=0)

    def thresholds(self, largest: np.ndarray) -> np.ndarray:
        """f64[D]: the error at which each dataset is probably taken, given largest errors of many steps.

        That is where its error, which grows by its weight w each step, has likely been the largest once:
        the mean of max(threshold - largest, 0) is w.
        """
        ordered = np.sort(largest.reshape(-1).astype(np.float64))
        means = (np.arange(len(ordered)) * ordered - np.cumsum(ordered) + ordered) / len(ordered)
        return np.interp(self._all_weights, means, ordered)

    def run(
        self,
        taken_CP: np.ndarray,
        starts_P: np.ndarray,
        num_steps: int,
        datasets_PS: np.ndarray | None = None,
        samples_PS: np.ndarray | None = None,
    ) -> np.ndarray:
        """`num_steps` steps of every part, into the two arrays if given: what has been taken then, f64[C, P]."""
        parts = _Parts(self, taken_CP, starts_P)
        for begin in range(0, num_steps, _BLOCK_STEPS):
            count = min(_BLOCK_STEPS, num_steps - begin)
            parts.advance(count)
            if datasets_PS is not None and samples_PS is not None:
                classes_SP, turns_SP = parts.classes_SP[:count], parts.turns_SP[:count]
                steps_SP = parts.steps_P - np.arange(count, 0, -1.0)[:, None]
                taken_SP = self.weights.take(classes_SP) * steps_SP - parts.largest_SP[:count]
                samples_PS[:, begin : begin + count] = np.rint(taken_SP, out=taken_SP).T
                datasets_PS[:, begin : begin + count] = self.members(classes_SP, turns_SP).T
            parts.renew()
        return parts.taken()

    def members(self, classes: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The datasets whose turn it is in the classes."""
        return self._members.take(classes * self._widest + turns)


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value among those of its column, from the least on."""
    return np.argsort(np.argsort(values, axis=0, kind="stable"), axis=0, kind="stable")


class _Parts:
    """Parts of the steps, side by side, each at its own step.

    Attributes: steps_P f64, the step that each is at; of the last `advance`, classes_SP and turns_SP i64, the
    class of each choice and which of its members had its turn, and largest_SP f32, its error.
    """

    def __init__(self, rule: _Rule, taken_CP: np.ndarray, starts_P: np.ndarray) -> None:
        self._rule = rule
        num_parts = len(starts_P)
        self.steps_P = starts_P.astype(np.float64)
        self._sizes_C1 = rule.sizes[:, None]
        taken_CP = np.ascontiguousarray(taken_CP)  # both arrays are indexed flat
        self._turns_CP = (taken_CP % self._sizes_C1).astype(np.int64)
        self._errors_CP = self._exact_errors(taken_CP // self._sizes_C1)
        if rule.limits is not None:
            self._errors_CP[taken_CP >= (rule.limits * rule.sizes)[:, None]] = -np.inf
        self.classes_SP = np.empty((_BLOCK_STEPS, num_parts), np.int64)
        self.turns_SP = np.zeros((_BLOCK_STEPS, num_parts), np.int64)
        self.largest_SP = np.empty((_BLOCK_STEPS, num_parts), np.float32)
        self._growth_C1 = rule.weights.astype(np.float32)[:, None]
        self._near_CP = np.empty(taken_CP.shape, bool)
        self._code_CP = np.empty(taken_CP.shape, rule.codes_C1.dtype)

    def _exact_errors(self, rounds_CP: np.ndarray) -> np.ndarray:
        return (self._rule.weights[:, None] * self.steps_P - rounds_CP).astype(np.float32)

    def _rounds(self) -> np.ndarray:
        """f64[C, P]: how often all members of a class have been taken; inf where none is left. Errors are near."""
        rounds_CP = self._rule.weights[:, None] * self.steps_P
        rounds_CP -= self._errors_CP
        return np.rint(rounds_CP, out=rounds_CP)

    def renew(self) -> None:
        """Make the float32 errors anew, without what additions have left in them."""
        self._errors_CP = self._exact_errors(self._rounds())

    def taken(self) -> np.ndarray:
        """f64[C, P]: what has been taken of each class."""
        taken_CP = self._rounds() * self._sizes_C1 + self._turns_CP
        if self._rule.limits is not None:
            np.minimum(taken_CP, (self._rule.limits * self._rule.sizes)[:, None], out=taken_CP)
        return taken_CP

    def advance(self, num_steps: int) -> None:
        """At most _BLOCK_STEPS steps."""
        num_parts = len(self.steps_P)
        numbers_P = np.arange(num_parts)
        least_P, code_P, num_near_P = (np.empty(num_parts, t) for t in (np.float32, *[self._code_CP.dtype] * 2))
        near_bytes_CP = self._near_CP.view(np.uint8)
        flat = self._errors_CP.reshape(-1)
        for step in range(num_steps):
            largest_P, class_P = self.largest_SP[step], self.classes_SP[step]
            np.maximum.reduce(self._errors_CP, axis=0, out=largest_P)
            np.multiply(largest_P, 1 - _NEAR_RELATIVE, out=least_P)
            least_P -= _NEAR
            np.greater_equal(self._errors_CP, least_P, out=self._near_CP)
            np.multiply(near_bytes_CP, self._rule.codes_C1, out=self._code_CP)
            np.maximum.reduce(self._code_CP, axis=0, out=code_P)
            np.add.reduce(near_bytes_CP, axis=0, dtype=num_near_P.dtype, out=num_near_P)
            np.subtract(code_P, 1, out=class_P, casting="unsafe")
            unsure_U = np.flatnonzero(num_near_P != 1)
            if len(unsure_U):
                class_P[unsure_U], largest_P[unsure_U] = self._decide(unsure_U)
            at_P = class_P * num_parts
            at_P += numbers_P
            flat[at_P] = self._take(step, at_P)
            self.steps_P += 1
            self._errors_CP += self._growth_C1

    def _take(self, step: int, at_P: np.ndarray) -> np.ndarray:
        """Take what step `step` has chosen, which stands at `at_P` in the arrays: f32[P], the errors after it."""
        rule, largest_P, class_P = self._rule, self.largest_SP[step], self.classes_SP[step]
        is_last_P: np.ndarray | bool = True
        if not rule.are_single:
            turns = self._turns_CP.reshape(-1)
            turn_P = turns.take(at_P, out=self.turns_SP[step]) + 1
            is_last_P = turn_P == rule.sizes.take(class_P)
            turn_P[is_last_P] = 0
            turns[at_P] = turn_P
        after_P = largest_P - np.asarray(is_last_P, np.float32)
        if rule.limits is not None:
            rounds_P = np.rint(rule.weights.take(class_P) * self.steps_P - largest_P) + 1
            after_P[(rounds_P >= rule.limits.take(class_P)) & is_last_P] = -np.inf
        return after_P

    def _decide(self, unsure_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The class, and its error, where float32 leaves several: in float64, the first dataset of equals."""
        rule = self._rule
        numbers, classes = np.nonzero(self._near_CP[:, unsure_U].T)
        parts = unsure_U[numbers]
        shares = rule.weights.take(classes) * self.steps_P.take(parts)
        errors = shares - np.rint(shares - self._errors_CP[classes, parts])
        firsts = np.searchsorted(numbers, np.arange(len(unsure_U)))
        largest = np.maximum.reduceat(errors, firsts)
        datasets = rule.members(classes, self._turns_CP[classes, parts])
        datasets[errors != largest[numbers]] = rule.num_datasets
        chosen = np.flatnonzero(datasets == np.minimum.reduceat(datasets, firsts)[numbers])
        return classes[chosen], largest
