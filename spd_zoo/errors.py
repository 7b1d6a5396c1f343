"""The text of an exception, for use inside a sentence."""

__all__ = ["first_line"]


def first_line(error: BaseException, with_type: bool = False) -> str:
    """The first line of an error's message, or the name of its type if it has no message.

    Args:
        error: The exception.
        with_type: Put the name of the type before the message.
    """
    line, name = str(error).strip().partition("\n")[0], type(error).__name__
    if not line:
        return name
    return f"{name}: {line}" if with_type else line
