from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from fewbits.core.errors import InputError
from fewbits.core.registry import get_method, list_methods


def test_unknown_names_get_a_suggestion():
    with pytest.raises(InputError, match="did you mean 'gptq'"):
        get_method("gtpq")
    with pytest.raises(InputError, match="did you mean 'weights'"):
        list_methods("weight")


@pytest.mark.parametrize("name", list_methods())
def test_every_method_keeps_the_house_rules(name):
    method = get_method(name)
    assert method.name() == name and method.paper.title and name in list_methods(method.family())
    assert is_dataclass(method) and len(fields(method)) <= 18
    with pytest.raises(FrozenInstanceError):
        setattr(method(), fields(method)[0].name, None)
    assert method.baseline is None or method.baseline in list_methods()
