"""Recommenders that need no language model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def log_popularity(num_train: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Log of add-one smoothed popularity, `log((n_i + 1) / (sum_j n_j + I))`; sums to 1.

    Args:
        num_train: (I,) training interactions of each item.

    Returns:
        (I,) nats; a cold item gets the smallest value, never minus infinity.
    """
    smoothed = np.asarray(num_train, dtype=np.float64) + 1.0
    shares: npt.NDArray[np.float64] = np.log(smoothed) - np.log(smoothed.sum())
    return shares
