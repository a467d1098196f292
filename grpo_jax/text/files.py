"""Files of tokenizers and templates."""

import os
import pathlib

from grpo_jax.errors import InputError


def read(path: str) -> bytes:
    """The bytes of a file; raises InputError when it cannot be read."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def write(path: pathlib.Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
