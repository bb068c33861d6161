"""Make bad banks for as long as asked and open each: none may crash, hang over a second, write elsewhere, or get in unsound.

python scripts/fuzz_banks.py --count 1000000
"""

import random
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main(
    count: Annotated[int, typer.Option(help="banks")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="of the first bank; each has its own")] = 0,
) -> None:
    """Fuzz the reader of banks and print what became of them; the seed of one that does harm makes it again."""
    from bad_banks import Court

    torch.set_num_threads(1)
    court, start = Court(), perf_counter()
    for each in tqdm(range(seed, seed + count), unit=" banks", mininterval=2):
        try:
            court.try_one(random.Random(each).randrange)
        except BaseException:
            print(f"the bank of --seed {each} --count 1 does harm", file=sys.stderr)
            raise
    seconds = perf_counter() - start
    print(
        f"{count} bad banks in {seconds:.0f} s: {court.counts['refused']} refused, {court.counts['sound']} sound all the same"
    )
    print(f"0 crashes, 0 written elsewhere, 0 unsound; the slowest took {1000 * court.slowest:.0f} ms of the processor")


if __name__ == "__main__":
    typer.run(main)
