"""The order in which rows are drawn: a pure function of seed and draw number."""

import numpy as np
from jaxtyping import Int


def row_order(draws: Int[np.ndarray, "n"], size: int, seed: int, shuffle: bool) -> Int[np.ndarray, "n"]:
    """Row of each draw number: draw d is place d % size of epoch d // size, each epoch in its own seeded order.

    The order sorts raw Philox words, which numpy promises to keep between its versions (shuffles it does not).
    """
    draws = np.asarray(draws, np.int64)
    epochs, places = np.divmod(draws, size)
    if not shuffle:
        return places
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs):
        words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(size)
        here = epochs == epoch
        chosen[here] = np.argsort(words, kind="stable")[places[here]]
    return chosen
