"""How many processor threads torch should use on this machine, at this moment.

torch takes one thread a core. At every operation these threads wait for the slowest of them. If another program keeps a core
busy, the slowest one has to wait for its turn, thousands of times a second, and two threads are many times slower than one.
"""

import os
import time

import torch

WIDTH = 576
"""Of the trial's layers: those of a small language model."""
ROUNDS, SECONDS = 3, 0.2
"""The trial takes about so many seconds, spread over so many rounds."""
CLEARLY = 0.9
"""More threads are taken if they need less than this share of the time."""


def best_threads(seconds: float = SECONDS) -> int:
    """The number of threads with which torch is fastest now, found by a trial of `seconds`.

    It times the operations of one decoder layer on a few tokens, with 1, 2, 4, ... threads in turns, up to the number that
    torch has now. torch's number is left as it was. If the variable OMP_NUM_THREADS is set, its number is returned untried.
    """
    now = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS") or now == 1:
        return now
    counts = sorted({now, *(2**k for k in range(now.bit_length()))})
    weights = [torch.full((3 * WIDTH, WIDTH), 1 / WIDTH), torch.full((WIDTH, 3 * WIDTH), 1 / WIDTH)]
    spent = dict.fromkeys(counts, 0.0)
    try:
        for _ in range(ROUNDS):
            for count in counts:
                torch.set_num_threads(count)
                spent[count] += _seconds_per_layer(weights, seconds / ROUNDS / len(counts))
    finally:
        torch.set_num_threads(now)
    return fewest_fast(spent)


def fewest_fast(seconds: dict[int, float]) -> int:
    """Of numbers of threads and the seconds each needs, the fastest; fewer threads if more are not clearly faster."""
    best = min(seconds)
    for count in sorted(seconds):
        best = count if seconds[count] < CLEARLY * seconds[best] else best
    return best


def use_threads(count: int = 0) -> int:
    """Let torch use `count` threads, or as many as are fastest now (0), and return the number.

    >>> use_threads(1)
    1
    """
    count = count or best_threads()
    torch.set_num_threads(count)
    return count


@torch.no_grad()
def _seconds_per_layer(weights: list[torch.Tensor], seconds: float) -> float:
    """Mean seconds of one pass over the weights, repeated for at least so many seconds after one pass to warm up."""
    x, passes, start = torch.ones(3, WIDTH), -1, time.perf_counter()
    while passes < 1 or time.perf_counter() - start < seconds:
        for weight in weights:
            x = torch.nn.functional.silu(x @ weight.T)
        x, passes = x / x.norm(dim=-1, keepdim=True), passes + 1
        start = time.perf_counter() if passes == 0 else start
    return (time.perf_counter() - start) / passes
