"""Hypothesis strategies for embeddings. Every number is drawn by hypothesis, so failures shrink and replay."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


def numbers(bound: float = 4.0) -> st.SearchStrategy[float]:
    """Floats exactly representable in 32 bits, bounded, without subnormals."""
    return st.floats(-bound, bound, width=32, allow_subnormal=False)


FEW = st.integers(2, 7)
ANY = st.integers(1, 7)


@st.composite
def matrices(draw, rows=FEW, columns=ANY, bound: float = 4.0) -> torch.Tensor:
    """(n, d) float64, among them constant columns, repeated rows and zeros."""
    n, d = draw(rows), draw(columns)
    matrix = draw(hnp.arrays(np.float64, (n, d), elements=numbers(bound)))
    kind = draw(st.sampled_from(["plain", "plain", "constant column", "repeated row", "zero row"]))
    if kind == "constant column":
        matrix[:, draw(st.integers(0, d - 1))] = draw(numbers(bound))
    elif kind == "repeated row":
        matrix[draw(st.integers(0, n - 1))] = matrix[draw(st.integers(0, n - 1))]
    elif kind == "zero row":
        matrix[draw(st.integers(0, n - 1))] = 0
    return torch.from_numpy(matrix)


@st.composite
def pairs(draw, rows=FEW, columns=ANY, bound: float = 4.0):
    """Two views of the same batch: two (n, d) float64 matrices."""
    n, d = st.just(draw(rows)), st.just(draw(columns))
    return draw(matrices(n, d, bound)), draw(matrices(n, d, bound))


@st.composite
def spread(draw, columns=ANY) -> torch.Tensor:
    """(n, d) float64 in which no column is near constant: distinct integers plus a fraction."""
    n, d = draw(st.integers(3, 7)), draw(columns)
    order = np.stack([draw(st.permutations(range(n))) for _ in range(d)], 1)
    fraction = draw(hnp.arrays(np.float64, (n, d), elements=st.floats(0, 0.5, width=32, allow_subnormal=False)))
    return torch.from_numpy(order + fraction)
