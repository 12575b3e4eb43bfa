"""Errors of the user's making."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what, and what to do."""


def check_range(option: str, value: float, low: float, high: float = float("inf")) -> None:
    """InputError unless low <= value <= high (so NaN is refused)."""
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise InputError(f"{option} {value}: must be {allowed}")


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{option} {value}: choose {', '.join(map(str, choices))}")


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
