"""Does the training of encoders survive being killed, and does the number of processes matter?

    python scripts/check_training.py kill [--times 10]
    python scripts/check_training.py processes

The first kills a run at random moments, with SIGKILL, lets it end and compares its last bytes with those of a run left alone.
The second compares `accelerate launch` on two processes with one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from graphs.synthetic import superposed
from safetensors import safe_open

from steerlib.evaluation.representation import explained_variance
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.fit.inputs import Tokens
from steerlib.training.fit.run import CHECKPOINT, fit

app = typer.Typer(add_completion=False)
STEPS = 300
RECIPES = {
    "topk": EncoderRecipe(kind="topk", latents=256, k=4, batch=256, rate=3e-3, dead_after=8_000),
    "batchtopk": EncoderRecipe(kind="batchtopk", latents=256, k=4, batch=256, rate=3e-3, normalise="std"),
    "relu": EncoderRecipe(kind="relu", latents=128, batch=256, rate=3e-3, sparsity=0.1, normalise="none"),
}
QUIET = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def source() -> Tokens:
    """Superposed features."""
    return Tokens(superposed(8_000, seed=3).x, seed=1)


@app.command()
def run(folder: Path) -> None:
    """Train some encoders, or go on with them; the other commands start it."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator, tokens = Accelerator(cpu=True), source()
    print(f"begun {accelerator.num_processes}\n", end="", flush=True)  # in one piece: two processes write
    fit(RECIPES, tokens, steps=STEPS, folder=folder, save_every=10, accelerator=accelerator)


@app.command()
def kill(
    times: Annotated[int, typer.Option(help="how often to kill it")] = 10,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    """Kill a run again and again, let it end, and compare it with one left alone."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        killed, alone = Path(name) / "killed", Path(name) / "alone"
        whole = left_alone(alone)
        for turn in range(times):
            killed_after(moments.uniform(0, 1.5 * whole / times), killed, early=turn % 3 == 0)
        left_alone(killed)
        same = (killed / CHECKPOINT).read_bytes() == (alone / CHECKPOINT).read_bytes()
    print(f"killed {times} times: the last bytes {'are the same' if same else 'DIFFER'}")
    raise SystemExit(not same)


def left_alone(folder: Path) -> float:
    """Let a run end; the seconds it took after it began."""
    with subprocess.Popen([sys.executable, __file__, "run", str(folder)], stdout=subprocess.PIPE, env=QUIET) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start = time.perf_counter()
        if process.wait():
            raise SystemExit("a run that was left alone failed")
        return time.perf_counter() - start


def killed_after(seconds: float, folder: Path, *, early: bool) -> None:
    """Start a run and kill it so long after it began, or unless `early` after it wrote its first checkpoint."""
    file = folder / CHECKPOINT
    before = file.stat().st_mtime_ns if file.exists() else 0
    with subprocess.Popen([sys.executable, __file__, "run", str(folder)], stdout=subprocess.PIPE, env=QUIET) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not early and process.poll() is None and (file.stat().st_mtime_ns if file.exists() else 0) == before:
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        ended = process.wait() != -signal.SIGKILL
    state = safe_open(file, "pt").metadata()["state"] if file.exists() else '{"step": 0}'
    what, since = "it had ended" if ended else "killed", "it began" if early else "its first checkpoint"
    print(f"{what} {seconds:.2f} s after {since}; the last was of step {json.loads(state)['step']}", flush=True)


@app.command()
def processes() -> None:
    """Train on one process and on two, and compare what the encoders explain."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0", "--num_cpu_threads_per_process=1"]
    x, explained = superposed(8_000, seed=3).x, {}
    with tempfile.TemporaryDirectory() as name:
        for count, how in ((1, "--cpu"), (2, "--multi_gpu")):  # which is how accelerate says "several", on CPUs too
            folder = Path(name) / str(count)
            command = [*launch, how, f"--num_processes={count}", __file__, "run", str(folder)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=QUIET).stdout
            if said.count(f"begun {count}") != count:
                raise SystemExit(f"expected {count} processes, got {said!r}")
            encoders = fit(RECIPES, source(), steps=STEPS, folder=folder)
            explained[count] = {name: explained_variance(x, e.reconstruct(x)) for name, e in encoders.items()}
    apart = {name: abs(explained[1][name] - explained[2][name]) for name in RECIPES}
    for name, difference in apart.items():
        print(f"{name:>10}: explained {explained[1][name]:.6f} on one, {explained[2][name]:.6f} on two, {difference:.1e} apart")
    raise SystemExit(max(apart.values()) > 1e-3)


if __name__ == "__main__":
    app()
