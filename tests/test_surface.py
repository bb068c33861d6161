"""What the package shows: public names, light import, namespace."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_house import modules

import steerlib as sl

ROOT = Path(__file__).parent.parent


def test_only_attach_registers_hooks():
    register = [name for name, path in modules().items() if "register_forward" in path.read_text()]
    assert register == ["hooks.attach"]


def test_public_names_are_listed_sorted_and_there():
    assert sorted(sl.__all__) == sl.__all__
    public = {n for n in vars(sl) if not n.startswith("_") and not isinstance(vars(sl)[n], ModuleType)}
    assert public == set(sl.__all__)


HEAVY = ("transformers", "diffusers", "sklearn", "typer", "accelerate", "peft")


@pytest.mark.parametrize(("code", "light"), [("import steerlib", True), ("import steerlib, transformers", False)])
def test_import_is_light_and_this_test_can_fail(code, light):
    check = f"{code}; import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)), 'hooks' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout.strip() == "[] False") is light
    assert done.stderr == "" or not light


def test_core_and_hooks_come_from_the_same_checkout():
    import steerlib.concept_banks
    import steerlib.hooks

    homes = {Path(str(module.__file__)).resolve().parent.parent for module in (steerlib.hooks, steerlib.concept_banks)}
    assert homes == {ROOT.resolve()} and Path(str(sl.__file__)).resolve().parent.parent == ROOT.resolve()
    assert "hooks" not in sys.modules
