"""The exception for bad input, in a place every folder may import."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says why and what would be accepted."""
