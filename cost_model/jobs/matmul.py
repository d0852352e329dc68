"""Seconds of a matmul on J devices.

    seconds = max(2 m n k / (rate * e_tile * e_fill), bytes / hbm)

GPUs: the m x n result is cut in tiles, the tiles are dealt to the S multiprocessors in whole
rounds, and the best of a few tile shapes is taken (NVIDIA, "Matrix Multiplication Background",
tile and wave quantisation). A short reduction k does not fill the pipeline: k / (k + k0). Where
there are fewer tiles than multiprocessors the reduction is split between them.
TPUs: k and n are padded to the width w of the systolic array and m to 8 rows (scaling book,
"TPUs"), and the same fill term holds.
"""

from __future__ import annotations

import numpy as np

# (rows, columns, rate relative to the largest tile): smaller tiles load more bytes per flop.
_TILES = ((256.0, 128.0, 1.0), (128.0, 256.0, 1.0), (128.0, 128.0, 0.94), (128.0, 64.0, 0.82))


def tile_efficiency(
    m: np.ndarray,
    n: np.ndarray,
    k: np.ndarray,
    sm_count: np.ndarray,
    array_width: np.ndarray,
    batch: np.ndarray | float = 1.0,
) -> np.ndarray:
    """[J] useful share of the computed tiles, at most 1; the tiles of a batch share the rounds."""
    best = np.zeros_like(m * n)
    for rows, columns, rate in _TILES:
        tiles = np.ceil(m / rows) * np.ceil(n / columns) * batch
        split = np.clip(np.floor(sm_count / tiles), 1.0, np.maximum(np.floor(k / 1024.0), 1.0))
        work = tiles * split
        rounds = np.ceil(work / sm_count)
        useful = (batch * m * n) / (tiles * rows * columns) * work / (rounds * sm_count)
        best = np.maximum(best, useful * rate)
    width = np.maximum(array_width, 1.0)
    padded = (np.ceil(m / 8.0) * 8.0) * (np.ceil(n / width) * width) * (np.ceil(k / width) * width)
    return np.where(array_width > 0, m * n * k / padded, best)


def matmul_s(
    m: np.ndarray,
    n: np.ndarray,
    k: np.ndarray,
    *,
    batch: np.ndarray | float = 1.0,
    flops_per_s: np.ndarray,
    hbm_bytes_per_s: np.ndarray,
    sm_count: np.ndarray,
    array_width: np.ndarray,
    fill_k: np.ndarray,
    element_bytes: np.ndarray | float = 2.0,
) -> np.ndarray:
    """[J] seconds of `batch` matmuls m x k by k x n; the batch shares the tile rounds."""
    m, n, k = (np.maximum(x, 1.0) for x in (m, n, k))
    tile = tile_efficiency(m, n, k, sm_count, array_width, batch)
    flops = 2.0 * batch * m * n * k
    compute = flops / (flops_per_s * np.maximum(tile, 1e-3) * k / (k + fill_k))
    traffic = batch * ((m * k + k * n) * element_bytes + m * n * 2.0) / hbm_bytes_per_s
    return np.maximum(compute, traffic)


def linear_s(
    tokens: np.ndarray, n: np.ndarray, k: np.ndarray, **how: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward seconds [J] of a linear layer k -> n over `tokens` rows.

    Backward is the gradient of the input (tokens x n by n x k) and of the weight
    (k x tokens by tokens x n).
    """
    forward = matmul_s(tokens, n, k, **how)
    backward = matmul_s(tokens, k, n, **how) + matmul_s(k, n, tokens, **how)
    return forward, backward
