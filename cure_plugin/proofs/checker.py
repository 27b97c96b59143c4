"""Checks proofs of branch and bound: numpy in float64, forward arithmetic only, no code of what found them.

The files are told in docs/proofs.md. Any numbers give bounds (weak duality). Rounding is at most gamma_n times sums
of absolute values (Higham 2002, section 3.1); norms are verified by Cholesky factors (Rump 2006).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Net = list[tuple[dict[int, Array], Array]]  # (matrices by source, bias) of each layer
_NUMBERS = ("slopes", "splits", "multipliers", "budget")
_EXTRA = 64  # roundings of one neuron's closed form and of sums of a few sums, at most


class FaultyProofError(Exception):
    """It does not prove what it claims."""


def _growth(terms: int) -> float:  # Higham's gamma, rounded up
    return 1.01 * terms * 2.0**-53 / (1 - terms * 2.0**-53)


def _norm(matrix: Array) -> float:
    """Upper bound of the spectral norm; LinAlgError where it cannot be verified."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram, off = wide @ wide.T, _growth(wide.shape[1] + 4) * float((wide**2).sum())
    square = float(max(np.linalg.eigvalsh(gram), default=0.0)) * (1 + 1e-8) + 2 * off + 1e-300
    np.linalg.cholesky(square * np.eye(len(gram)) - gram)
    return float(np.sqrt(square * (1 + 1e-8) + off))


class _Layer(NamedTuple):  # what may be active, ``unstable`` neurons first
    kept: Array
    unstable: int
    weights: dict[int, Array]
    bias: Array
    ends: tuple[Array, Array]
    clean: Array
    radius: float
    sizes: Array


class ImageProof:
    """The proof of one image, given the arrays of the file; FaultyProofError where its set is none."""

    def __init__(self, net: Net, read: Any) -> None:
        self.net, self.read = net, read
        self.x, self.low, self.high = (read[name].astype(float) for name in ("x", "low", "high"))
        self.p, self.eps, self.label = float(read["p"]), float(read["eps"]), int(read["label"])
        self.coupled = bool(read["coupled"])
        finite = np.isfinite([*self.x, *self.low, *self.high, self.eps]).all() and self.p in (1, 2, np.inf)
        if not finite or (self.low > 0).any() or (self.high < 0).any() or self.eps < 0:
            raise FaultyProofError("no set around a point")
        self.layers: list[_Layer] = []
        budget = self.eps if self.p < np.inf else np.inf  # ``reach``: how far each source moves in all, in l2
        self.reach = [min(float(np.linalg.norm(np.maximum(-self.low, self.high))) * (1 + 1e-9), budget)]
        self.outputs = [(self.x + self.low, self.x + self.high)]
        self.largest = [np.maximum(-self.outputs[0][0], self.outputs[0][1])]

    def values(self, point: Array) -> list[Array]:
        """z_1 to the logits at an input (n_0,)."""
        sources, values = [point], []
        for weights, bias in self.net:
            values.append(sum((weight @ sources[j] for j, weight in weights.items()), bias))
            sources.append(np.maximum(values[-1], 0))
        return values

    def check(self) -> tuple[int, float]:
        """(leaves, the smallest bound); FaultyProofError where something does not follow."""
        for k, clean in enumerate(self.values(self.x)[:-1], 1):
            self._add(k, clean)
        (weights, bias), least = self._rows(len(self.net)), np.inf
        classes, signs = (self.read[f"leaf/{part}"] for part in ("class", "signs"))
        for j in set(range(len(bias))) - {self.label}:
            chosen = np.flatnonzero(classes == j)
            if not covers(signs[chosen]):
                raise FaultyProofError(f"the leaves of class {j} do not cover all signs")
            for some in np.array_split(chosen, -(-len(chosen) // 256)):
                over = {i: np.repeat((w[self.label] - w[j])[None], len(some), 0) for i, w in weights.items()}
                margin = np.full(len(some), bias[self.label] - bias[j])
                bounds = self._bound(over, margin, self._numbers("leaf", some), signs[some])
                least = float(np.minimum(least, bounds.min()))  # not a number stays that
                if not least > 0:
                    raise FaultyProofError(f"a leaf of class {j} has the bound {least:.3g}")
        return len(classes), least

    def _numbers(self, name: str, index: Array | slice) -> list[Array]:
        found = [self.read[f"{name}/{part}"][index].astype(float) for part in _NUMBERS]
        if not all(np.isfinite(one).all() for one in found):
            raise FaultyProofError("numbers that are not finite")
        return found

    def _rows(self, k: int) -> tuple[dict[int, Array], Array]:
        """Layer ``k`` over what is kept of the layers below."""
        weights, bias = self.net[k - 1]
        return {j: w if j == 0 else w[:, self.layers[j - 1].kept] for j, w in weights.items()}, bias

    def _add(self, k: int, clean: Array) -> None:
        """Check the bounds of layer ``k``, and keep what may be active."""
        (weights, bias), lower, upper = self._rows(k), self.read[f"lower/{k}"], self.read[f"upper/{k}"]
        sizes = (np.abs(bias) + sum(np.abs(w) @ self.largest[j] for j, w in weights.items())) * (1 + 1e-9)
        rounding = _growth(sum(w.shape[1] for w in weights.values()) + _EXTRA) * sizes
        low, high = bias - rounding, bias + rounding
        for j, w in weights.items():
            (least, most), positive, negative = self.outputs[j], np.maximum(w, 0), np.minimum(w, 0)
            low, high = low + positive @ least + negative @ most, high + positive @ most + negative @ least
        if self.coupled:
            moved = sum(np.linalg.norm(w, axis=1) * self.reach[j] for j, w in weights.items()) * (1 + 1e-9) + rounding
            low, high = np.maximum(low, clean - moved), np.minimum(high, clean + moved)
        for number in range(int(self.read[f"boxes/{k}"])):
            index, numbers = self.read[f"box/{k}/{number}/index"], self._numbers(f"box/{k}/{number}", slice(None))
            over = {j: np.concatenate([w[index], -w[index]]) for j, w in weights.items()}
            found = self._bound(over, np.concatenate([bias[index], -bias[index]]), numbers, None)
            low[index] = np.maximum(low[index], found[: len(index)])
            high[index] = np.minimum(high[index], -found[len(index) :])
        if not ((lower <= low) & (upper >= high) & (lower <= clean) & (upper >= clean)).all():
            raise FaultyProofError(f"bounds of layer {k} do not follow")
        unstable = np.flatnonzero((lower < 0) & (upper > 0))
        kept = np.concatenate([unstable, np.flatnonzero((lower >= 0) & (upper > 0))])

        def radius(which: Array) -> float:
            box = float(np.linalg.norm(np.maximum(clean - lower, upper - clean)[which])) * (1 + 1e-9)
            by_norm = sum(self._behind(w[which], j) for j, w in weights.items())
            return min(box, (by_norm + float(np.linalg.norm(rounding))) * (1 + 1e-9)) if self.coupled else box

        after = np.maximum(clean, 0) - np.maximum(lower, 0), np.maximum(upper, 0) - np.maximum(clean, 0)
        self.reach.append(min(radius(kept), float(np.linalg.norm(np.maximum(*after))) * (1 + 1e-9)))
        self.outputs.append((np.maximum(lower[kept], 0), np.maximum(upper[kept], 0)))
        self.largest.append(self.outputs[k][1])
        parts = {j: w[kept] for j, w in weights.items()}, bias[kept], (lower[unstable], upper[unstable])
        self.layers.append(_Layer(kept, len(unstable), *parts, clean[unstable], radius(unstable), sizes[kept]))

    def _behind(self, matrix: Array, j: int) -> float:
        """How far its outputs move in all, in l2."""
        by_l1 = float(np.linalg.norm(matrix, axis=0).max()) * self.eps if j == 0 and self.p == 1 else np.inf
        return min(by_l1, _norm(matrix) * self.reach[j])

    def _bound(self, over: dict[int, Array], bias: Array, numbers: list[Array], signs: Array | None) -> Array:
        """Lower bounds of rows (R, n_j) over the sources j, whatever rounding did."""
        value, error = bias.copy(), np.abs(bias) + sum(np.abs(a) @ self.largest[j] for j, a in over.items())
        error *= _growth(_EXTRA + sum(a.shape[1] for a in over.values()))
        starts = np.cumsum([0, *(layer.unstable for layer in self.layers)])
        for k in range(len(self.layers), 0, -1):
            layer, part = self.layers[k - 1], slice(starts[k - 1], starts[k])
            a = over.pop(k, np.zeros((len(value), len(layer.bias))))
            row, sign = a[:, : layer.unstable], np.int8(0) if signs is None else signs[:, part]
            low, high = layer.ends[0] * (sign != 1), layer.ends[1] * (sign != -1)
            slopes, m = numbers[0][:, part], np.maximum(numbers[2][:, k - 1 : k], 1e-300)
            if not self.coupled:  # where a row is negative the chord is best
                slopes = np.where(row >= 0, slopes, np.where(low < 0, high / np.maximum(high - low, 1e-300), 1.0))
            g = slopes * row - numbers[1][:, part]
            ends, rest, to = np.maximum(-low, high), row - g, layer.clean
            size = ((np.abs(row) + 2 * np.abs(g)) * ends).sum(1)
            if self.coupled:  # min over [low, high] of row relu(z) - g z + m/2 ((z - clean)^2 - radius^2)
                active, inactive = np.clip(to - rest / m, 0, high), np.clip(to + g / m, low, 0)
                at_active = rest * active + m / 2 * (active - to) ** 2
                at_inactive = -g * inactive + m / 2 * (inactive - to) ** 2
                value += np.minimum(at_active, at_inactive).sum(1) - m[:, 0] / 2 * layer.radius**2
                size += (m * (ends + np.abs(to)) ** 2).sum(1) + m[:, 0] * layer.radius**2
            else:
                value += np.minimum(np.minimum(rest * high, 0), np.minimum(-g * low, 0)).sum(1)
            passed = np.concatenate([g, a[:, layer.unstable :]], 1)
            value += passed @ layer.bias
            terms = _EXTRA + passed.shape[1] + sum(w.shape[1] for w in layer.weights.values())
            error += _growth(layer.unstable + _EXTRA) * size + _growth(terms) * (np.abs(passed) @ layer.sizes)
            for j, weight in layer.weights.items():
                over[j] = over.get(j, 0) + passed @ weight
        first, price = over.get(0, np.zeros((len(value), len(self.x)))), np.maximum(numbers[3][:, None], 1e-300)
        size = np.abs(first) @ (np.abs(self.x) + 4 * np.maximum(-self.low, self.high))
        if self.p == 2:
            d = np.clip(-first / price, self.low, self.high)  # of a better price
            price = price * np.clip(np.linalg.norm(d, axis=1, keepdims=True) / max(self.eps, 1e-12), 0.2, 5)
            d = np.clip(-first / price, self.low, self.high)
            value += (first * d + price / 2 * d**2).sum(1) - price[:, 0] / 2 * self.eps**2
            size += 8 * price[:, 0] * ((d**2).sum(1) + self.eps**2)
        else:  # the l1 budget's price is the coefficient where it is spent, largest first; any >= 0 gives a bound
            order, widths = np.argsort(-np.abs(first), 1), np.where(first > 0, -self.low, self.high)
            spent = np.cumsum(np.take_along_axis(widths, order, 1), 1) >= self.eps
            spent = np.take_along_axis(np.abs(first), order, 1) * spent
            price = spent.max(1, keepdims=True) * (self.p == 1)
            value += np.minimum(np.minimum((first + price) * self.high, (first - price) * self.low), 0).sum(1)
            value -= price[:, 0] * self.eps
            size += 8 * price[:, 0] * (np.maximum(-self.low, self.high).sum() + self.eps)
        error += _growth(len(self.x) + _EXTRA) * size
        return value + first @ self.x - 1.01 * error - 2.0**-50 * np.abs(value)


def covers(signs: Array) -> bool:
    """Whether every vector of signs 1 and -1 agrees with a row of ``signs``, where 0 is either."""
    if len(signs) and not (signs != 0).any(1).all():  # a row that asks for nothing
        return True
    split = np.flatnonzero((signs != 0).all(0))
    halves = (np.delete(signs[signs[:, split[0]] == side], split[0], 1) for side in (1, -1))
    return len(signs) > 0 and len(split) > 0 and all(map(covers, halves))
