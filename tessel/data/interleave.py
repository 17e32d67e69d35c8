"""Which dataset of a blend comes next: Megatron's greedy rule for many steps side by side.

At step i, the dataset with the largest error weight * max(i, 1) - taken comes next, in float64, the first
of equals (megatron-core's helpers.cpp). Each choice depends on all before it, so the steps are cut into
parts that run side by side, each from a guessed state: the rule corrects itself, and after some steps the
guess is forgotten. A part is kept only if it began in the very state in which the part before it ended;
the others run again from that state. What is returned is thus what step after step would give.

Within a part, errors are carried along as whole numbers of a small unit, with the class in the lowest bits: the
largest key tells both, and once it is lowered the next largest tells whether it was the largest beyond doubt. Where
others come near it, their errors are computed in float64 as the rule has it. Datasets of equal weight take turns in
their order, so they are carried along as one class.
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
# After so many steps, the keys are made anew from float64, and the choices written down.
_BLOCK_STEPS = 128
# Errors closer than so many units, and what float64 rounds, are compared in float64: each of two is rounded by half a
# unit at first and by another half while it grows, and the classes in the lowest bits make up less than one.
_NEAR_UNITS = 3
# So many datasets have keys of 32 bits, three of them before the point: errors from -1.125 to 6.875. No error falls
# below -1, since the largest is never below 0; none of 128 exceeds 6.5, since cups that one unit in all is poured into
# before each time that one is taken out of the fullest never hold more than the harmonic number of cups, 5.5, and one.
_MAX_NARROW = 128
_MIDDLE = 2.875
# Runs from a first guess, to learn at which errors datasets are taken.
_PILOT_PARTS = 256
_PILOT_BLOCKS = 2
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
        seen.append(parts.largest(_BLOCK_STEPS))
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
        # Keys: 3 bits of an error are before its point.
        is_narrow = self.num_datasets <= _MAX_NARROW
        self.key_type: type[np.signedinteger] = np.int32 if is_narrow else np.int64
        self.class_bits = (self.num_classes - 1).bit_length()
        self.unit_bits = 29 - self.class_bits if is_narrow else 32
        # [steps, class]: what is added to the keys after each step of a block; the sums are rounded, not the parts.
        units = np.rint(np.arange(_BLOCK_STEPS + 1)[:, None] * self.weights * 2.0**self.unit_bits).astype(np.int64)
        self.growth_SC1 = (np.diff(units, axis=0) << self.class_bits).astype(self.key_type)[:, :, None]

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
                taken_SP = self.weights.take(classes_SP) * steps_SP - parts.largest(count)
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
    class of each choice and which of its members had its turn, and keys_SP, its key.
    """

    def __init__(self, rule: _Rule, taken_CP: np.ndarray, starts_P: np.ndarray) -> None:
        self._rule = rule
        num_parts = len(starts_P)
        self.steps_P = starts_P.astype(np.float64)
        self._sizes_C1 = rule.sizes[:, None]
        taken_CP = np.ascontiguousarray(taken_CP)  # indexed flat
        self._turns_CP = (taken_CP % self._sizes_C1).astype(np.int64)
        self._gone_CP = None if rule.limits is None else taken_CP >= (rule.limits * rule.sizes)[:, None]
        self._keys_CP = np.empty(taken_CP.shape, rule.key_type)
        self._set_keys(taken_CP // self._sizes_C1)
        self.classes_SP = np.empty((_BLOCK_STEPS, num_parts), np.int64)
        self.turns_SP = np.zeros((_BLOCK_STEPS, num_parts), np.int64)
        self.keys_SP = np.empty((_BLOCK_STEPS, num_parts), rule.key_type)

    def _set_keys(self, rounds_CP: np.ndarray) -> None:
        """Keys of classes all of whose members have been taken so often; the least where none is left."""
        rule = self._rule
        units_CP = rule.weights[:, None] * self.steps_P
        units_CP -= rounds_CP + _MIDDLE
        units_CP *= 2.0**rule.unit_bits
        np.rint(units_CP, out=units_CP)
        np.copyto(self._keys_CP, units_CP, casting="unsafe")
        self._keys_CP <<= rule.class_bits
        self._keys_CP += np.arange(rule.num_classes, dtype=rule.key_type)[:, None]
        self._hide_gone()

    def _hide_gone(self) -> None:
        if self._gone_CP is not None:
            np.copyto(self._keys_CP, np.iinfo(self._keys_CP.dtype).min, where=self._gone_CP)

    def _errors(self, keys: np.ndarray) -> np.ndarray:
        """f64: the errors in keys."""
        errors = (keys >> self._rule.class_bits) * 2.0**-self._rule.unit_bits
        errors += _MIDDLE
        return errors

    def _rounds(self) -> np.ndarray:
        """f64[C, P]: how often all members of a class have been taken. Keys are near."""
        rounds_CP = self._rule.weights[:, None] * self.steps_P
        rounds_CP -= self._errors(self._keys_CP)
        np.rint(rounds_CP, out=rounds_CP)
        if self._gone_CP is not None:
            assert self._rule.limits is not None
            np.copyto(rounds_CP, self._rule.limits[:, None], where=self._gone_CP)
        return rounds_CP

    def renew(self) -> None:
        """Make the keys anew, without what roundings have left in them."""
        self._set_keys(self._rounds())

    def taken(self) -> np.ndarray:
        """f64[C, P]: what has been taken of each class."""
        taken_CP = self._rounds() * self._sizes_C1 + self._turns_CP
        if self._rule.limits is not None:
            np.minimum(taken_CP, (self._rule.limits * self._rule.sizes)[:, None], out=taken_CP)
        return taken_CP

    def largest(self, num_steps: int) -> np.ndarray:
        """f64[S, P]: the error of each choice of the last `advance`."""
        return self._errors(self.keys_SP[:num_steps])

    def advance(self, num_steps: int) -> None:
        """At most _BLOCK_STEPS steps."""
        rule, keys_CP = self._rule, self._keys_CP
        num_parts = len(self.steps_P)
        numbers_P = np.arange(num_parts)
        largest_share = float(rule.weights[-1] * (self.steps_P.max(initial=0) + num_steps))
        near = _NEAR_UNITS + int(4 * np.spacing(largest_share) * 2.0**rule.unit_bits)
        near <<= rule.class_bits
        one, mask = rule.key_type(1 << (rule.unit_bits + rule.class_bits)), rule.key_type((1 << rule.class_bits) - 1)
        lowered_P, next_P = (np.empty(num_parts, rule.key_type) for _ in range(2))
        at_P, is_near_P = np.empty(num_parts, np.int64), np.empty(num_parts, bool)
        flat = keys_CP.reshape(-1)
        for step in range(num_steps):
            key_P, class_P = self.keys_SP[step], self.classes_SP[step]
            np.maximum.reduce(keys_CP, axis=0, out=key_P)
            np.bitwise_and(key_P, mask, out=class_P)
            np.multiply(class_P, num_parts, out=at_P)
            np.add(at_P, numbers_P, out=at_P)
            np.subtract(key_P, one, out=lowered_P)
            flat[at_P] = lowered_P
            np.maximum.reduce(keys_CP, axis=0, out=next_P)
            np.subtract(key_P, near, out=lowered_P)
            np.greater(next_P, lowered_P, out=is_near_P)
            if is_near_P.any():
                self._decide(step, is_near_P.nonzero()[0], near, at_P)
            self._end_step(step, at_P)
            keys_CP += rule.growth_SC1[step]
            self._hide_gone()
        self.steps_P += num_steps

    def _end_step(self, step: int, at_P: np.ndarray) -> None:
        """What a choice changes but its key: whose turn is next in its class, and whether that has any left."""
        rule, class_P = self._rule, self.classes_SP[step]
        if rule.are_single and self._gone_CP is None:
            return
        turns = self._turns_CP.reshape(-1)
        turn_P = turns.take(at_P, out=self.turns_SP[step]) + 1
        is_last_P = turn_P == rule.sizes.take(class_P)
        turn_P[is_last_P] = 0
        turns[at_P] = turn_P
        goes_on_P = ~is_last_P
        self._keys_CP.reshape(-1)[at_P[goes_on_P]] = self.keys_SP[step][goes_on_P]
        if rule.limits is not None and self._gone_CP is not None:
            shares_P = rule.weights.take(class_P) * (self.steps_P + step)
            rounds_P = np.rint(shares_P - self._errors(self.keys_SP[step])) + 1
            self._gone_CP.reshape(-1)[at_P] = (rounds_P >= rule.limits.take(class_P)) & is_last_P

    def _decide(self, step: int, unsure_U: np.ndarray, near: int, at_P: np.ndarray) -> None:
        """Choose again where several keys are near the largest: by float64, the first dataset of equals."""
        rule, num_parts = self._rule, len(self.steps_P)
        flat, key_P, class_P = self._keys_CP.reshape(-1), self.keys_SP[step], self.classes_SP[step]
        flat[at_P[unsure_U]] = key_P[unsure_U]
        numbers, classes = np.nonzero((self._keys_CP[:, unsure_U] > key_P[unsure_U] - near).T)
        parts = unsure_U[numbers]
        shares = rule.weights.take(classes) * (self.steps_P.take(parts) + step)
        errors = shares - np.rint(shares - self._errors(self._keys_CP[classes, parts]))
        firsts = np.searchsorted(numbers, np.arange(len(unsure_U)))
        largest = np.maximum.reduceat(errors, firsts)
        datasets = rule.members(classes, self._turns_CP[classes, parts])
        datasets[errors != largest[numbers]] = rule.num_datasets
        chosen = np.flatnonzero(datasets == np.minimum.reduceat(datasets, firsts)[numbers])
        class_P[unsure_U] = classes[chosen]
        at_U = classes[chosen] * num_parts + unsure_U
        at_P[unsure_U], key_P[unsure_U] = at_U, flat[at_U]
        flat[at_U] -= rule.key_type(1 << (rule.unit_bits + rule.class_bits))
