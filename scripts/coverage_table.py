"""The coverage tables of the READMEs: `python scripts/coverage_table.py text|images|fits > coverage.md`.

Text: builds every causal-LM architecture of transformers at toy size, as `tests/test_families.py` does, and prints how many
sites of each kind were found; the test proves that each of them moves as it should. Images: runs the contract of
`tests/test_pipelines.py` over every family and prints what held. Fits: what is said of a bank beside models that are like its
own, whose rows `tests/test_matching.py` compares with the README.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

PARTS = {"layers.1": "block output", "layers.1.in": "block input", "layers.1.attn": "attention", "layers.1.mlp": "feed-forward",
         "layers.1.attn.heads.0": "heads", "embed": "embeddings", "norm": "final norm"}  # fmt: skip
CLAIMS = {
    "an_edit_of_nothing": "amount 0: same bits",
    "the_site_moves": "moves by the vector",
    "progress_is": "noise level",
    "outside_its_window": "windows, steps",
    "one_half_of_guidance": "one half of guidance",
    "a_batch_of_different": "an amount an image",
    "a_box_moves": "box in a non-square image",
    "nothing_is_left": "nothing left behind",
}
"""What each test of the contract shows, by the beginning of its name."""
HALVES = {
    "stacked": "right: both halves in one batch, in the order that the source joins or parts them",
    "apart": "right: one call for each half, told by what it is given",
    "guider": "right: the guider names each call",
    "one pass": "right: no guidance, all is the prompt's half",
    "parts": "right: runs other pipelines, which are told as above",
    "": "refused while guided, since the source does not show its halves; `branch='both'` works",
}
"""What becomes of a pipeline by what its source shows."""


def text() -> None:
    """Print the table of language models and what is missing from it."""
    import transformers
    from test_families import TYPES, attempt, is_covered

    from steerlib.hosts import host_for

    models = {name: attempt(name) for name in TYPES}
    built = {name: model for name, model in models.items() if not isinstance(model, str)}
    covered = [name for name, model in built.items() if is_covered(model)]
    found = {label: sum(site in host_for(model).sites() for model in built.values()) for site, label in PARTS.items()}
    print(f"| transformers {transformers.__version__} | architectures |\n|---|---|")
    print(f"| known as causal language models | {len(TYPES)} |")
    print(f"| built at toy size | {len(built)} ({len(built) / len(TYPES):.0%}) |")
    print(f"| steered | {len(covered)} ({len(covered) / len(built):.0%} of those built) |")
    print("\n".join(f"| … with {label} as a named site | {count} |" for label, count in found.items()))
    print(f"\nBuilt, but only steerable by module paths: {', '.join(sorted(set(built) - set(covered)))}.")
    print(f"Not built: {', '.join(name for name in TYPES if name not in built)}; `pytest tests/test_families.py -rs` says why.")


def outcomes() -> dict[tuple[str, str], bool]:
    """Whether each claim held for each family."""
    with TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_pipelines.py", f"--junitxml={report}"]
        subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.DEVNULL, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    held: dict[tuple[str, str], bool] = {}
    for case in cases:
        name, _, given = case.attrib["name"].removeprefix("test_").partition("[")
        claim = next((label for start, label in CLAIMS.items() if name.startswith(start)), "")
        key = claim, given.rstrip("]").rpartition("-")[2]
        held[key] = held.get(key, True) and not [*case]
    return held


def images() -> None:
    """Print the table of pipelines."""
    import diffusers
    from tiny_pipelines import PIPELINES

    held = outcomes()
    print(f"| diffusers {diffusers.__version__} | {' | '.join(CLAIMS.values())} |\n|{'---|' * (len(CLAIMS) + 1)}")
    for family in PIPELINES:
        marks = [{True: "✓", False: "✗", None: "–"}[held.get((claim, family))] for claim in CLAIMS.values()]
        print(f"| {family} | {' | '.join(marks)} |")
    halves()


def halves() -> None:
    """Print how the pipelines that diffusers exports show their halves of guidance."""
    from kindred_pipelines import evidence, exported

    found: dict[str, list[str]] = {}
    for name, cls in exported().items():
        found.setdefault(evidence(cls), []).append(name)
    count, how = sum(map(len, found.values())), "by their source (those that build are also run and compared)"
    print(f"\n| all {count} pipeline classes: `branch=` and amounts an image, {how} | classes |\n|---|---|")
    for how, label in HALVES.items():
        named = f": {', '.join(found[how])}" if len(found.get(how, ())) < 10 and how in ("", "guider") else ""
        print(f"| {label}{named} | {len(found.get(how, ()))} |")


def fits() -> None:
    """Print what is said of a bank beside models that are like its own."""
    from test_matching import table

    print(table())


if __name__ == "__main__":
    {"text": text, "images": images, "fits": fits}[sys.argv[1]]()
