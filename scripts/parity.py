"""Compare the readers with the libraries whose files they read: every one writes, both read, codes and outputs must agree.

Once, in an environment of its own (two of the peers ask for versions that cannot be installed together, and need none of them):

    python -m venv peers && . peers/bin/activate
    pip install -c scripts/constraints-peers.txt torch
    pip install -c scripts/constraints-peers.txt sae-lens eai-sparsify nnsight gguf lm_eval scikit-learn -e .
    pip install -c scripts/constraints-peers.txt --no-deps dictionary-learning repeng

Four are no packages; with `--checkouts FOLDER` they are taken from clones in it, under these names, else left out:
surkovv/sdxl-unbox, kim-dahye/steerers, IBM/activation-steering and SAeUron. Then

    python scripts/parity.py [--checkouts FOLDER] [--fixtures tests/fixtures/foreign]

prints a line for each: differences on whole numbers, where sums are exact and many potentials equal their threshold or another
potential, and on real numbers. `--fixtures` keeps the files and what the peers made of them, for the tests.
"""

# pyright: reportMissingImports=false
import argparse
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import parity_peers as peers
import torch
from parity_peers import CASES, VECTORS, D, beside, whole
from safetensors.torch import save_file
from torch import Tensor

import steerlib as sl
from steerlib.readers import saelens as saelens_files


def compare(name: str, folder: Path) -> tuple[str, dict[str, Tensor], str]:
    """A line of the report, what the peer made of some activations, and the format."""
    format, codes, outputs = CASES[name](folder)
    bank = sl.read_bank(folder, format)
    (id,) = bank.encoders
    encoder: Any = bank.encoder(id)
    kept, differences, ties = {}, [], 0
    for kind, x in (("whole", whole(64, D)), ("real", torch.randn(16, D))):
        x = settled(encoder, x)[:16]
        with torch.no_grad():
            z, y = codes(x).float(), outputs(x).float()
        ours = encoder.encode(x), encoder.reconstruct(x)
        differences += [float((ours[0] - z).abs().max()), float((ours[1] - y).abs().max())]
        ties = int((encoder.potential(x) == encoder.thresholds()).sum()) if kind == "whole" else ties
        kept |= {f"{kind}.{name}": tensor[:12].clone() for name, tensor in (("x", x), ("z", z), ("y", y))}
    figures = "  ".join(f"{difference:.1e}" for difference in differences)
    return f"{name:<42} {figures}  {ties:>3} ties  {round_trip(format, folder, bank)}".rstrip(), kept, format


def settled(encoder: Any, x: Tensor) -> Tensor:
    """Tokens on which it is settled which latents are the k largest: the peers break ties each in a way of its own."""
    if not encoder.competes(encoder.settings):
        return x
    values = encoder.potential(x).topk(encoder.k + 1).values
    return x[(values[:, -2] > values[:, -1]) | (values[:, -1] <= 0)]


def round_trip(format: str, folder: Path, bank: Any) -> str:
    """Whether SAELens files come back bit by bit, through memory and through a bank on disk."""
    if format != "saelens":
        return ""
    with tempfile.TemporaryDirectory() as there:
        bank.save_pretrained(Path(there) / "bank")
        (memory,), (disk,) = (
            saelens_files.write(source, Path(there) / place)
            for source, place in ((bank, "memory"), (sl.ConceptBank.from_pretrained(Path(there) / "bank"), "disk"))
        )
        same = [
            (copy / name).read_bytes() == (folder / name).read_bytes()
            for copy in (memory, disk)
            for name in saelens_files.FILES
        ]
    return "bits return" if all(same) else f"bits differ {same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, default=Path("checkouts"))
    parser.add_argument("--fixtures", type=Path)
    parser.add_argument("--only", default="", help="those whose name begins so")
    options = parser.parse_args()
    peers.CHECKOUTS = options.checkouts.resolve()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'largest difference of':<42} codes    outputs  codes    outputs\n{'':<42} whole numbers     real numbers")
    for name in [name for name in (*CASES, *VECTORS) if name.startswith(options.only)]:
        torch.manual_seed(sum(map(ord, name)))
        with tempfile.TemporaryDirectory() as there:
            folder = options.fixtures or Path(there)
            shutil.rmtree(folder / name, ignore_errors=True)
            try:
                print(report(name, folder), flush=True)
            except ImportError as error:
                print(f"{name:<42} left out: {error}", flush=True)
            except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and the others shall be heard
                print(f"{name:<42} failed: {type(error).__name__}: {error}", flush=True)


def report(name: str, folder: Path) -> str:
    if name in VECTORS:
        return f"{name:<42} {VECTORS[name](folder)}"
    line, kept, format = compare(name, folder / name)
    save_file(kept, beside(folder / name), {"format": format})
    return line


if __name__ == "__main__":
    main()
