from dataclasses import dataclass
from typing import Literal

import pytest

from fewbits.core.config import configure, read_spec
from fewbits.core.errors import InputError


@dataclass(frozen=True)
class Example:
    bits: int = 4
    group_size: int | None = 128
    damping: float = 0.01
    symmetric: bool = False
    search: Literal["minmax", "shrink"] = "minmax"


def test_text_and_values_give_the_same_method():
    text = {"bits": "3", "group_size": "none", "damping": "1e-3", "symmetric": "true", "search": "shrink"}
    values = {"bits": 3, "group_size": None, "damping": 1e-3, "symmetric": True, "search": "shrink"}
    assert configure(Example, text) == configure(Example, values) == Example(3, None, 1e-3, True, "shrink")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bit": "3"}, "has no field 'bit'; did you mean 'bits'"),
        ({"bits": "three"}, "bits='three' is not right; a whole number would be"),
        ({"bits": 3.5}, "a whole number would be"),
        ({"bits": True}, "a whole number would be"),
        ({"group_size": "x"}, "a whole number or none would be"),
        ({"search": "best"}, "'minmax' or 'shrink' would be"),
        ({"symmetric": "1"}, "true or false would be"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(values, says):
    with pytest.raises(InputError, match=says):
        configure(Example, values)


def test_a_method_and_its_fields_in_one_word():
    assert read_spec("kivi") == ("kivi", {})
    assert read_spec("kivi:bits=2, group_size=32") == ("kivi", {"bits": "2", "group_size": "32"})
    with pytest.raises(InputError, match="the field 'bits' has no value"):
        read_spec("kivi:bits")
