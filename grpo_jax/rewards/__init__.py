"""Rewards: in-graph verifiers, their text twins, host rewards and the scorer that joins them."""
