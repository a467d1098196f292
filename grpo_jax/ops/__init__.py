"""Pure functions on arrays: masks, log-probabilities, advantages, objectives, attention, norms, rotary positions."""
