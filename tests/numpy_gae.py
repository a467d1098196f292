"""Generalized advantages in float64 numpy, by the sum of their definition."""

import numpy as np


def token_rewards(rewards, mask, penalty) -> np.ndarray:
    """-penalty at each unmasked token, and the row's reward at its last."""
    out = np.zeros(np.shape(mask))
    for b, row in enumerate(np.asarray(mask)):
        places = np.flatnonzero(row)
        out[b, places] = -np.float64(penalty[b, places])
        if len(places):
            out[b, places[-1]] += rewards[b]
    return out


def gae(rewards, values, mask, gamma, lam) -> np.ndarray:
    """A_t = sum_n (gamma lam)^n delta_(t+n) over the unmasked tokens of each row."""
    out = np.zeros(np.shape(mask))
    for b, row in enumerate(np.asarray(mask)):
        places = np.flatnonzero(row)
        v = np.append(np.float64(values[b, places]), 0.0)
        delta = np.float64(rewards[b, places]) + gamma * v[1:] - v[:-1]
        for i, place in enumerate(places):
            out[b, place] = sum((gamma * lam) ** n * d for n, d in enumerate(delta[i:]))
    return out
