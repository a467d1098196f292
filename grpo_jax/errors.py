"""The one exception for what a user can mend: a single line that names file, field, value and fix."""


class InputError(ValueError):
    """Bad input, refused with one line; the command line prints it to stderr and exits with code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
