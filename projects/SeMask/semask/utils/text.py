"""Words that messages and reports share."""


def pluralize(number: int, noun: str) -> str:
    """A number of things, such as "1 image" or "2 images".

    Args:
        number: of the things, 0 or more.
        noun: what one of them is called; its plural ends in "s".
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
