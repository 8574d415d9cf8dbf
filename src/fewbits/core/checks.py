"""Checks that the fields of many methods need, with one wording."""

from fewbits.core.errors import InputError


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InputError where `value` is not within `low` and `high`, both included."""
    if not low <= value <= high:
        raise InputError(f"{name}={value} is out of range; {low} to {high} would be right")


def check_positive(name: str, value: float, example: float) -> None:
    """Raises InputError where `value` is not above zero."""
    if not value > 0:
        raise InputError(f"{name}={value} is out of range; a positive number such as {example} would be right")


def check_group_size(size: int | None, name: str = "group_size") -> None:
    """Raises InputError where `size` is neither None, for whole rows, nor 1 or more. Rows may end in a shorter group."""
    if size is not None and size < 1:
        raise InputError(f"{name}={size} is out of range; 1 or more, or none for whole rows, would be right")
