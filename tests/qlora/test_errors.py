"""Checks that name the option, the value and what is allowed."""

import math

import pytest

from qlora.errors import InputError, check_choice, check_range, first_line


def test_check_range():
    check_range("--a", 1, 1)
    check_range("--a", 2.0, 1, 2)
    with pytest.raises(InputError, match=r"^--a 0: must be at least 1$"):
        check_range("--a", 0, 1)
    with pytest.raises(InputError, match=r"^--a 3: must be between 1 and 2$"):
        check_range("--a", 3, 1, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError):
            check_range("--a", bad, 0, 10)


def test_check_choice():
    check_choice("--b", 4, (4, 8))
    with pytest.raises(InputError, match=r"^--b 3: choose 4, 8$"):
        check_choice("--b", 3, (4, 8))


def test_first_line():
    assert first_line(ValueError("\none\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
