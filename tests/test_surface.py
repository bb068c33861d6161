"""The shape of the package: layers, public names, light import, namespace."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import steerlib as sl

ROOT = Path(__file__).parent.parent
RANKS = {
    "errors": -1,
    "sites": 0, "schedules": 0, "concepts": 0,
    "trust": 0, "signature": 0, "hub": 1, "manifest": 1.5, "layout": 1.7, "cards": 1, "causal": 0,
    "sentences": 0, "search": 1, "encoders": 1, "graph": 1, "masks": 0.5, "replay": 1, "interventions": 1, "hosts": 1,
    "edits": 2, "programs": 2.5, "bank": 2, "hooks.families": 2, "hooks.attach": 2.2, "hooks.modules": 2, "hooks": 2,
    "hooks.calls": 2.5, "hooks.pipelines": 2.5, "hooks.registry": 2.5, "hooks.transformers": 3, "hooks.diffusers": 3,
    "readers": 3, "reports": 2, "exports": 3, "view": 3.5, "plans": 3, "recording": 3, "steering": 4, "evaluation": 5,
    "training": 6,
    "steerlib": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
STAGES = {
    "readers": (
        "files", "hookpoints", "foreign", "saelens", "sparsify", "repeng", "gemma_scope", "gemma_scope_2",
        "dictionary_learning", "llama_scope", "sdxl_unbox", "saeuron", "svec", "lm_eval",
    ),
    "evaluation": (
        "scenes", "faces", "judges", "places", "image", "text", "comparison", "representation", "probing", "synthetic",
        "systems", "steered", "hierarchies", "compiled", "edges", "mediation", "report",
    ),
    "training": (
        "encoder_recipe", "recipe", "documents", "activations", "attributes", "shards", "harvest", "inputs", "sparse_step",
        "dense_step", "learner", "fit", "levers", "objectives", "methods", "studio", "calibrate", "card", "measure", "label",
        "quality", "verify", "lasso", "screen", "rows", "regress", "independence", "confirm", "minimality", "discover",
        "text_graph", "latents", "contrast", "wording", "noised", "pictures", "painting", "scene_bank", "scene_effects",
        "scene_graph", "scene_do", "scene_card", "pipeline",
    ),
}  # fmt: skip


def name_of(path):
    relative = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return relative.removesuffix(".__init__").removeprefix("steerlib.")


def rank_of(module):
    parts = module.split(".")
    key = ".".join(parts[:2]) if parts[0] == "hooks" else parts[0]
    return RANKS[key]


def imports(path):
    """Modules of steerlib that a file imports, by name inside the package."""
    package = ["steerlib", *path.relative_to(ROOT / "steerlib").parts[:-1]] if path.is_relative_to(ROOT / "steerlib") else None
    package = package or ["steerlib", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("steerlib")):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            if node.module is None or whole == "steerlib":
                yield from (f"{whole}.{alias.name}".removeprefix("steerlib.") for alias in node.names)
            else:
                yield whole.removeprefix("steerlib.")


def sources():
    core = [p for p in (ROOT / "steerlib").rglob("*.py") if "hooks" not in p.parts and "concept_banks" not in p.parts]
    return sorted([*core, *(ROOT / "hooks").glob("*.py")])


def is_upward(importer, imported):
    (package, *inner), (other, *inner_other) = importer.split("."), imported.split(".")
    if package == other and inner and inner_other and package in STAGES:
        first, second = (STAGES[package].index(names[0]) for names in (inner, inner_other))
        return first <= second and not inner[0] == inner_other[0] == "methods"
    if importer.startswith("encoders") and imported.startswith("encoders") or package == other == "readers":
        return False
    return rank_of(imported) >= rank_of(importer)


def test_a_module_imports_only_lower_ranks():
    upward = {
        (name_of(path), imported) for path in sources() for imported in imports(path) if is_upward(name_of(path), imported)
    }
    assert not upward


def test_the_layer_rule_can_fail():
    assert is_upward("sites", "steering") and not is_upward("bank", "hub")
    assert is_upward("evaluation.text", "evaluation.report") and is_upward("evaluation.text", "training.recipe")
    assert is_upward("training.methods.pca", "training.studio") and is_upward("training.studio", "training.studio")
    assert not is_upward("training.methods.gated", "training.methods.orthogonal")


def test_only_attach_registers_hooks():
    register = [name_of(path) for path in sources() if "register_forward" in path.read_text()]
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
