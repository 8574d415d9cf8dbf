"""Errors that a user can act on: one line that says what is wrong, where, and what would be right."""


class FewbitsError(Exception):
    """Base of every error that fewbits raises on purpose; its text is one line for the user."""


class InputError(FewbitsError):
    """The user's input is wrong: a path, a name, a value, a file. The command line ends with status 2."""


class NumericsError(FewbitsError):
    """A weight, activation, scale or factorization is not usable; the text names the layer."""


class BrokenModelError(NumericsError, InputError):
    """The model that was given holds numbers that are not finite: wrong input, found while computing."""


def reason_of(error: BaseException) -> str:
    """The first line of what a library says, without its final dot; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
