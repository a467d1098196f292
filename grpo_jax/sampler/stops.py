"""Stop strings inside the program: an automaton over token ids that knows when their text has been written."""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class StopTable(flax.struct.PyTreeNode):
    """The state after a token, by the state before it; the last state is that of a string found, and stays.

    It follows the bytes of tokens, so that a string is found however it is cut into them.
    """

    following: Int[Array, "states V"]

    def step(self, state: Int[Array, "S"], token: Int[Array, "S"]) -> Int[Array, "S"]:
        """States after the tokens."""
        return self.following[state, token]

    def found(self, state: Int[Array, "S"]) -> Bool[Array, "S"]:
        """Where a stop string has been written."""
        return state == self.following.shape[0] - 1


def stop_table(strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopTable | None:
    """The automaton of Aho and Corasick (1975) for the strings' UTF-8, a step of it being a whole token.

    `token_bytes` are the bytes that each token id adds to the text. None when there are no strings.
    """
    patterns = [text.encode() for text in strings if text]
    if not patterns:
        return None
    prefixes = sorted({p[:i] for p in patterns for i in range(len(p))}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    found = len(prefixes)

    def after(text: bytes) -> int:
        if any(text.endswith(p) for p in patterns):
            return found
        return next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)

    by_byte = np.full((found + 1, 256), found, np.int32)
    for prefix, state in number.items():
        by_byte[state] = [after(prefix + bytes([byte])) for byte in range(256)]
    following = np.repeat(np.arange(found + 1, dtype=np.int32)[:, None], len(token_bytes), axis=1)
    lengths = np.array([len(b) for b in token_bytes])
    table = np.zeros((len(token_bytes), max(lengths.max(initial=0), 1)), np.uint8)
    for token, text in enumerate(token_bytes):
        table[token, : len(text)] = np.frombuffer(text, np.uint8)
    for place in range(table.shape[1]):
        here = place < lengths
        following[:, here] = by_byte[following[:, here], table[here, place][None, :]]
    return StopTable(jnp.asarray(following))
