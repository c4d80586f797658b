"""Compiled models: every method is one graph without draws, with the numbers it has uncompiled."""

import pytest
import torch

from loralab.methods import all_methods
from loralab.testing import check_torch_compile
from loralab.testing.toy import kinds

FORMS = {type(method.recipe.form): name for name, method in all_methods().items()}


@pytest.mark.parametrize("name", all_methods())
def test_every_method_is_one_graph(name):
    check_torch_compile(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS.values())
def test_every_form_is_one_graph_on_other_layers(name):
    for kind in kinds(name)[1:]:
        check_torch_compile(name, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "hira"])
def test_kinds_of_form_run_through_inductor(name):
    check_torch_compile(name, backend="inductor")


@pytest.mark.parametrize("name", ["lora", "dora", "hira", "oft", "hydralora"])
def test_autocast_is_one_graph_too(name):
    with torch.autocast("cpu", torch.bfloat16):
        check_torch_compile(name)
