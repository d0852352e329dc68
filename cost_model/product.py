"""The shapes of a matrix multiplication, as the formulas of its cycles read them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import item_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Products [m, k] @ [k, n], ``b`` of each; sizes are arrays of one shape."""

    b: Any
    m: Any
    k: Any
    n: Any
    size: Any = 2
    """bytes of an operand's element."""
    out: Any = 2
    """bytes of a result's element."""
    turned: tuple[Any, Any] = (False, False)
    """which operand lies transposed in memory: [k, m], [n, k]."""

    @classmethod
    def of(
        cls,
        batch: ArrayLike,
        m: ArrayLike,
        k: ArrayLike,
        n: ArrayLike,
        dtype: str = "bfloat16",
        out_dtype: str | None = None,
        turned: tuple[Any, Any] = (False, False),
    ) -> Product:
        """Of sizes that broadcast, operands of ``dtype`` and results of ``out_dtype``."""
        sides = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (batch, m, k, n)))
        b, m, k, n = sides
        size, out = item_bytes(dtype), item_bytes(out_dtype or dtype)
        return cls(b=b, m=m, k=k, n=n, size=size, out=out, turned=turned)
