"""Every example in a docstring runs, and prints what it says."""

import ast
import doctest
from importlib import import_module

import pytest
import torch
from test_house import modules

import steerlib as sl

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples():
    """Found in the source, since the shape checker that tests run under hides functions from doctest's own search."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, DOCUMENTED) and ">>> " in (text := ast.get_docstring(node) or ""):
                yield pytest.param(name, text, id=f"{name}:{getattr(node, 'name', '')}")


@pytest.fixture
def names(llama, bank):
    """What an example finds, beside what its own module knows: `sl`, `torch`, `model`, a Llama of two layers with random
    weights and a width of 32, and `bank`, its bank of two directions, the concepts "a" and "b" at the site "layers.0".
    Both are new for every docstring. Files are found from the top of the repository."""
    return {"sl": sl, "torch": torch, "model": llama, "bank": bank}


@pytest.mark.parametrize(("module", "text"), [*examples()])
def test_examples_of_docstrings_hold(module, text, names, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    known = vars(import_module(f"steerlib.{module}" if module != "steerlib" else module)) | names
    test = doctest.DocTestParser().get_doctest(text, known, module, None, None)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


def test_a_wrong_example_is_noticed(names):
    test = doctest.DocTestParser().get_doctest(">>> model.config.hidden_size\n31\n", names, "", None, None)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None).failed == 1
