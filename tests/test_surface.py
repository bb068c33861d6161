"""What the package shows: public names, light import, namespace."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_house import modules

import steerlib as sl

ROOT = Path(__file__).parent.parent


def test_only_attach_registers_hooks():
    register = [name for name, path in modules().items() if "register_forward" in path.read_text()]
    assert register == ["hooks.attach"]


def test_public_names_are_listed_sorted_and_there():
    assert sorted(sl.__all__) == sl.__all__
    assert {name for names in sl.HOMES.values() for name in names} == set(sl.__all__)
    public = {name for name in dir(sl) if not name.startswith("_") and not isinstance(getattr(sl, name), ModuleType)}
    assert public == set(sl.__all__)


def test_type_checkers_find_each_name_where_it_lives():
    checked = next(node for node in ast.parse(Path(str(sl.__file__)).read_text()).body if isinstance(node, ast.If))
    imported = {node.module: {name.name for name in node.names} for node in checked.body if isinstance(node, ast.ImportFrom)}
    assert imported == {home: set(names) for home, names in sl.HOMES.items()}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sl.nothing


def test_the_version_is_that_of_the_project():
    assert sl.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


HEAVY = ("transformers", "diffusers", "scipy", "sklearn", "matplotlib", "typer", "accelerate", "peft", "gguf", "causallearn")
EVERY = f"import steerlib as sl; [getattr(sl, name) for name in {sl.__all__}]"


@pytest.mark.parametrize(("code", "light"), [("import steerlib", True), (EVERY, True), ("import steerlib, scipy", False)])
def test_import_is_light_and_this_test_can_fail(code, light):
    check = f"{code}; import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)), 'hooks' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout.strip() == "[] False") is light
    assert done.stderr == "" or not light


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_tells_of_itself_without_torch(option):
    check = f"import sys; sys.argv = ['steerlib', '{option}']\nfrom steerlib.__main__ import main\ntry: main()\n"
    check += "finally: print('torch' in sys.modules, 'typer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("False True\n") and done.stderr == ""


def test_importing_loads_not_even_torch():
    check = "import sys, steerlib as sl; print('torch' in sys.modules); sl.steer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_core_and_hooks_come_from_the_same_checkout():
    import steerlib.concept_banks
    import steerlib.hooks

    homes = {Path(str(module.__file__)).resolve().parent.parent for module in (steerlib.hooks, steerlib.concept_banks)}
    assert homes == {ROOT.resolve()} and Path(str(sl.__file__)).resolve().parent.parent == ROOT.resolve()
    assert "hooks" not in sys.modules


@pytest.mark.parametrize("name", sl.__all__)
def test_help_of_every_public_name_shows_an_example(name):
    shown = inspect.getdoc(getattr(sl, name)) or ""
    assert ">>> " in shown  # which test_docstrings runs


def test_a_report_is_a_table_in_notebooks_and_takes_nothing_as_markup(llama):
    bank = sl.ConceptBank.from_directions({"<b>": torch.ones(llama.config.hidden_size)}, site="layers.0", base=llama)
    with sl.steer(llama, bank, {"<b>": 1.0}) as session:
        llama(torch.tensor([[1, 2, 3]]))
    page = session._repr_html_()
    assert page.count("<tr>") == 2 and "&lt;b&gt;" in page and "<b>" not in page
    assert session._repr_html_() == session.report()._repr_html_()
    assert sl.steer(llama, bank, {"<b>": 1.0})._repr_html_().startswith("<p>")


def test_figures_of_the_readme_stand_on_the_pages_that_it_links_to():
    """Where they are written by a command: a page of a folder, or a card that this page links to."""
    measured = (ROOT / "README.md").read_text().partition("## What was measured")[2].partition("## Limits")[0]
    rows = [row.strip("|").split("|") for row in measured.splitlines() if row.startswith("| ")][1:]
    for _, figures, links in rows:
        pages = {ROOT / link for link in re.findall(r"\]\(([^)#]+)", links)}
        pages |= {page.parent / card for page in pages for card in re.findall(r"\]\(([^)#]+/README\.md)", page.read_text())}
        text = "".join(page.read_text() for page in pages if page.exists()).replace("−", "-")
        numbers = re.findall(r"-?\d+(?:\.\d+)?", figures.replace("−", "-"))
        assert numbers and [number for number in numbers if number not in text] == []
