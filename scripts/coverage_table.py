"""The coverage table of the README: `python scripts/coverage_table.py > coverage.md`.

Builds every causal-LM architecture of transformers at toy size, as `tests/test_families.py` does, and prints how many sites
of each kind were found; the test proves that each of them moves as it should.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import transformers
from test_families import TYPES, attempt, is_covered

from steerlib.hosts import host_for

PARTS = {"layers.1": "block output", "layers.1.in": "block input", "layers.1.attn": "attention", "layers.1.mlp": "feed-forward",
         "layers.1.attn.heads.0": "heads", "embed": "embeddings", "norm": "final norm"}  # fmt: skip


def main() -> None:
    """Print the table and what is missing from it."""
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


if __name__ == "__main__":
    main()
