"""W* = W_R + λ (W_I − W_B) on stored numbers: one chunk of a tensor, in numpy.

Every step is a pass over arrays that stay in the caches, so what counts is the number of passes, and of calls: between
two of them a thread holds the interpreter lock, and the threads are in each other's way (measured: with 25 calls for
every 131072 elements two threads were 1.2 times as fast as one, with 17 for every 262144 1.7 times).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .codec import WORDS, all_finite, decode, decode_pairs, encode, encode_pairs, holds
from .io.disk import byte_buffer
from .io.header import ITEM_BYTES

_ROW = 8192  # elements of a dot product: long enough to be fast, too short for BLAS to start threads of its own


class Told(NamedTuple):
    """What became of one chunk: the squares of ‖Δ‖ and ‖W_R‖, and the elements that changed."""

    delta: float
    weight: float
    changed: int


class _Views(NamedTuple):
    """The buffers as chunks of one kind see them. `wide`: [3, count]; `words`: the three inputs and the output as
    stored; `pairs`: the inputs, where all four are bf16."""

    key: tuple[list[str], str, int]
    wide: np.ndarray
    words: list[np.ndarray]
    pairs: np.ndarray | None


class Chunk:
    """Buffers for one chunk of at most `nbytes` bytes of output, and the merge of what lies in them.

    `stored`: uint8 [4, bytes]: W_R, W_I, W_B and the output. `codes`: all dtypes that may lie there.
    """

    def __init__(self, codes: set[str], written: set[str], nbytes: int) -> None:
        items, width, self.nbytes = self.sizes(codes, written, nbytes)
        self.items = items
        self.stored = byte_buffer(4 * width).reshape(4, width)
        self._wide = byte_buffer(3 * items * (8 if "F64" in codes else 4))
        self._differ = np.empty(items, bool)
        self._views: _Views | None = None  # of the last chunk: the next one is most often of its kind

    @staticmethod
    def sizes(codes: set[str], written: set[str], nbytes: int) -> tuple[int, int, int]:
        """(elements of a chunk, bytes of a stored one, bytes of all buffers and of what numpy returns on the way).
        `written`: the dtypes of outputs; `codes`: those and the inputs'."""
        items = nbytes // min((ITEM_BYTES[code] for code in written), default=1)
        width = max([nbytes, *(items * ITEM_BYTES[code] for code in codes)])
        wide = 8 if "F64" in codes else 4
        again = items * (wide + 4 + 8) if len(codes) > 1 else 0  # W_R in the output's dtype, to see what changed
        return items, width, 4 * width + items * (3 * wide + 1) + again

    def merge(self, codes: list[str], code: str, count: int, lam: float) -> Told | None:
        """Merge `count` elements: the first three rows of `stored`, in `codes`, into the fourth, in `code`.

        None where an input or the result is not finite.
        """
        if self._views is None or (codes, code, count) != self._views.key:
            self._views = self._cut(codes, code, count)
        views, lrm, delta, other = self._views, *self._views.wide
        with np.errstate(all="ignore"):  # what overflows is found by looking
            if views.pairs is not None:
                decode_pairs(views.pairs, views.wide.reshape(3, 2, -1))
            else:
                for words, stored_as, into in zip(views.words, codes, views.wide, strict=False):
                    decode(words, stored_as, into)
            np.subtract(delta, other, out=delta)
            squares = _squares(views.wide[:2])
            if squares is None:
                return None
            task_arithmetic(lrm, delta, lam)
            if views.pairs is not None:
                encode_pairs(delta.reshape(2, -1), views.words[3], other.reshape(2, -1))
            else:
                encode(delta, code, views.words[3], other.view(np.float32)[:count])
            # no element is larger than a norm; a tenth more for what rounding adds
            bound = 1.1 * (squares[0] ** 0.5 + abs(float(delta.dtype.type(lam))) * squares[1] ** 0.5)
            if not holds(code, bound) and not all_finite(views.words[3], code):
                return None
            changed = _changed(views.words[0], codes[0], views.words[3], code, self._differ[:count])
        return Told(squares[1], squares[0], changed)

    def _cut(self, codes: list[str], code: str, count: int) -> _Views:
        kind = np.float64 if "F64" in codes else np.float32
        wide = self._wide.view(kind)[: 3 * count].reshape(3, count)
        rows = zip(self.stored, (*codes, code), strict=True)
        words = [row[: count * ITEM_BYTES[c]].view(WORDS[c]) for row, c in rows]
        paired = count % 2 == 0 and {*codes, code} == {"BF16"}
        return _Views((codes, code, count), wide, words, self.stored[:3, : 2 * count] if paired else None)


def task_arithmetic(lrm: np.ndarray, delta: np.ndarray, lam: float) -> None:
    """W_R + λ Δ, in place of Δ: the product and the sum are rounded, as in kernels.reference.project."""
    np.multiply(delta, delta.dtype.type(lam), out=delta)
    np.add(delta, lrm, out=delta)


def _squares(x: np.ndarray) -> list[float] | None:
    """‖x‖² of each row of [n, count], stretches of _ROW elements in the dtype of x, summed in fp64; None where x is not
    finite."""
    whole = x.shape[1] // _ROW * _ROW
    parts, rest = x[:, :whole].reshape(len(x), -1, 1, _ROW), x[:, None, whole:]
    totals = np.matmul(parts, parts.swapaxes(2, 3)).sum(axis=(1, 2, 3), dtype=np.float64)
    if rest.size:
        totals += np.matmul(rest, rest.swapaxes(1, 2))[:, 0, 0]
    found = totals.tolist()
    for i, total in enumerate(found):
        if not 1e-30 < total < float("inf"):
            if not all_finite(x[i], "F64" if x.dtype == np.float64 else "F32"):
                return None
            found[i] = float(np.square(x[i], dtype=np.float64).sum())  # too large or too small to square in fp32
    return found


def _changed(lrm: np.ndarray, stored_as: str, out: np.ndarray, code: str, differ: np.ndarray) -> int:
    """Elements that differ from the LRM's in the output's dtype; a zero's sign counts. `differ`: a scratch of bools."""
    if code != stored_as:
        wide = np.empty(len(lrm), np.float64 if "F64" in (code, stored_as) else np.float32)
        decode(lrm, stored_as, wide)
        lrm = np.empty_like(out)
        encode(wide, code, lrm, np.empty(len(out), np.float32))
    bits = f"u{out.itemsize}"
    return int(np.count_nonzero(np.not_equal(lrm.view(bits), out.view(bits), out=differ)))
