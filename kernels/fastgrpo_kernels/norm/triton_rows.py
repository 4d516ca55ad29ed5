"""Rows of C channels inside a Triton kernel, C of any size.

A row is a pair of pieces whose sizes are powers of two, its head and its tail: 1536 = 1024 + 512,
3072 = 2048 + 1024, 5120 = 4096 + 1024. In one block of the next power of two a quarter (1536 in
2048) to three eighths (5120 in 8192) of the lanes would be idle. The tail is None where the head
holds all; what lies beyond C is masked. `layout.row_constants` gives the sizes.

The order of a row's sums is part of its bits, and is a function of C and WIDTH alone: each thread
adds what it holds, head and tail, then the threads are added.
"""

from __future__ import annotations

from ..dispatch import jit, tl


@jit
def columns(HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of both pieces, of which a thread loads WIDTH neighbours at once."""
    head, tail = tl.max_contiguous(tl.arange(0, HEAD), WIDTH), None
    if TAIL:
        tail = HEAD + tl.max_contiguous(tl.arange(0, TAIL), WIDTH)
    return head, tail


@jit
def load(pointer, cols, C: tl.constexpr):
    """A row in fp32, 0 beyond it."""
    tail = None
    if cols[1] is not None:
        tail = tl.load(pointer + cols[1], mask=cols[1] < C, other=0.0).to(tl.float32)
    return tl.load(pointer + cols[0], mask=cols[0] < C, other=0.0).to(tl.float32), tail


@jit
def store(pointer, row, cols, C: tl.constexpr):
    """Round a row to the pointer's dtype, and write it."""
    tl.store(pointer + cols[0], row[0], mask=cols[0] < C)
    if cols[1] is not None:
        tl.store(pointer + cols[1], row[1], mask=cols[1] < C)


@jit
def zeros(cols):
    """A row of zeros."""
    tail = None
    if cols[1] is not None:
        tail = tl.zeros(cols[1].shape, tl.float32)
    return tl.zeros(cols[0].shape, tl.float32), tail


@jit
def rounded(row, dtype: tl.constexpr):
    """A row in fp32 after a rounding to this dtype."""
    tail = None
    if row[1] is not None:
        tail = row[1].to(dtype).to(tl.float32)
    return row[0].to(dtype).to(tl.float32), tail


@jit
def add(x, y):
    """x + y."""
    return x[0] + y[0], None if x[1] is None else x[1] + y[1]


@jit
def mul(x, y):
    """x y."""
    return x[0] * y[0], None if x[1] is None else x[1] * y[1]


@jit
def fma(x, y, z):
    """x y + z, rounded once."""
    return tl.fma(x[0], y[0], z[0]), None if x[1] is None else tl.fma(x[1], y[1], z[1])


@jit
def scaled(row, factor):
    """A row times a scalar."""
    return row[0] * factor, None if row[1] is None else row[1] * factor


@jit
def plus_one(row):
    """1 + row."""
    return 1.0 + row[0], None if row[1] is None else 1.0 + row[1]


@jit
def thread_sums(row, WIDTH: tl.constexpr, THREADS: tl.constexpr):
    """[THREADS]: the sum of what each thread holds of a row."""
    total = _folded(row[0], WIDTH, THREADS)
    if row[1] is not None:
        total += _folded(row[1], WIDTH, THREADS)
    return total


@jit
def _folded(piece, WIDTH: tl.constexpr, THREADS: tl.constexpr):
    """[N] -> [THREADS]. In rounds of all threads, a thread holds WIDTH neighbours of a piece, or
    N / THREADS if that is less.
    """
    GROUP: tl.constexpr = min(WIDTH, piece.shape[0] // THREADS)
    ROUNDS: tl.constexpr = piece.shape[0] // (GROUP * THREADS)
    return tl.sum(tl.sum(tl.reshape(piece, (ROUNDS, THREADS, GROUP)), axis=2), axis=0)
