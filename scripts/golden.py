"""Golden outputs: what this code makes of fixed models, banks and seeds, to be compared with what changed code makes of them.

    python scripts/golden.py record golden.safetensors      # before a change
    python scripts/golden.py compare golden.safetensors     # after it: equal bits, or a list of what differs

The cases are in the folder `goldens`. They use public names only, so that they run
unchanged on both sides. An entry is a path such as `law 1/llama/add/bare`; its first part is its group. Small models have
random weights; shipped banks act on the real models they were made for.
"""

import argparse
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers
from goldens import banks, images, text
from goldens.text import Found
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import steerlib as sl

PARTS = [(f"{name}/", make) for module in (text, images, banks) for name, make in module.PARTS]
VERSIONS = {lib.__name__: lib.__version__ for lib in (torch, transformers, diffusers)}


def flat(name: str, found: Found) -> Iterator[tuple[str, Tensor]]:
    """Entries as tensors: texts in UTF-8, what has parts under the names of the parts."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from flat(f"{name}/{key}", value)
    elif isinstance(found, str):
        yield name, torch.frombuffer(bytearray(found.encode()), dtype=torch.uint8)
    else:
        yield name, found.detach().clone().contiguous()


def everything(only: str, skip: str | None, failed: dict[str, str] | None = None) -> dict[str, Tensor]:
    """All entries by name. What raises ends the run, or is noted in `failed` where that is given."""
    made: dict[str, Tensor] = {}
    for prefix, make in PARTS:
        if not (prefix.startswith(only) or only.startswith(prefix)) or (skip and prefix.startswith(skip)):
            continue
        start, before, name = time.monotonic(), len(made), prefix
        try:
            for rest, compute in make():
                name = f"{prefix}{rest}"
                torch.manual_seed(0)
                try:
                    made.update((key, x) for key, x in flat(name, compute()) if key.startswith(only))
                except Exception as error:  # one entry less, and on with the others
                    if failed is None:
                        raise
                    failed[name] = f"{type(error).__name__}: {error}"
        except Exception as error:
            if failed is None:
                raise RuntimeError(f"at {name}") from error
            failed[f"{name} and what follows"] = f"{type(error).__name__}: {error}"
        print(f"{prefix:<34}{len(made) - before:>6} tensors {time.monotonic() - start:>6.1f} s", file=sys.stderr, flush=True)
    return made


def distance(old: Tensor, new: Tensor) -> float:
    """Largest difference of two tensors: 0 for equal bits, infinite for other shapes, types or places of NaN."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if old.numpy().tobytes() == new.numpy().tobytes():
        return 0.0
    apart = (old.double() - new.double()).abs()
    apart[old.double() == new.double()] = 0.0  # infinities of one sign, and the two zeros
    apart[old.isnan() & new.isnan()] = 0.0
    return float(apart.nan_to_num(nan=float("inf")).max())


def compare(file: Path, tolerance: float, only: str, skip: str | None) -> int:
    """Print a table by group and what is missing, new or too far off; 1 where something is missing or too far off."""
    failed: dict[str, str] = {}
    with safe_open(file, framework="pt") as stored:
        names = [n for n in stored.keys() if n.startswith(only) and not (skip and n.startswith(skip))]  # noqa: SIM118
        old, versions = {name: stored.get_tensor(name) for name in names}, stored.metadata()
    new = everything(only, skip, failed)
    if versions != VERSIONS:
        print(f"recorded with {versions}, compared with {VERSIONS}")
    groups, wrong = defaultdict(list), []
    for name in sorted(old.keys() & new.keys()):
        found = distance(old[name], new[name])
        same = old[name].shape == new[name].shape and old[name].numpy().tobytes() == new[name].numpy().tobytes()
        groups[name.partition("/")[0]].append((same, found))
        if not found <= tolerance:
            wrong.append(f"{name}: off by {found:.3g}, shape {[*old[name].shape]} → {[*new[name].shape]}")
            if old[name].dtype == new[name].dtype == torch.uint8 and "pixels" not in name:
                wrong += [f"    {line}" for x in (old, new) for line in bytes(x[name].tolist()).decode().splitlines()]
    print(f"{'group':<34}{'entries':>8}{'equal':>8}{'largest difference':>20}")
    for group, found in groups.items():
        print(f"{group:<34}{len(found):>8}{sum(same for same, _ in found):>8}{max(off for _, off in found):>20.3g}")
    missing = sorted(old.keys() - new.keys())
    for title, lines in (
        ("beyond the tolerance", wrong), ("missing", missing), ("failed", [f"{n}: {e}" for n, e in failed.items()]),
        ("not recorded before", sorted(new.keys() - old.keys())),
    ):  # fmt: skip
        if lines:
            print(f"\n{title}:\n" + "\n".join(f"  {line}" for line in lines))
    return int(bool(wrong or missing or failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("record", "compare"), help="write the file, or compare this code with it")
    parser.add_argument("file", type=Path, help="a safetensors file")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest difference that is allowed (default 1e-6)")
    parser.add_argument("--only", default="", metavar="PREFIX", help="entries whose names begin with this, such as 'law 1/'")
    parser.add_argument("--skip", metavar="PREFIX", help="leave out parts whose names begin with this, such as 'law 11'")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"steerlib from {Path(sl.__file__).parent}", file=sys.stderr)
    if given.do == "compare":
        return compare(given.file, given.tolerance, given.only, given.skip)
    save_file(made := everything(given.only, given.skip), given.file, metadata=VERSIONS)
    print(f"{len(made)} entries in {given.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
