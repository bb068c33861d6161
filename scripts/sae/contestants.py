"""One trainer of sparse autoencoders that `bench_sae_train.py` measures, in a process and an environment of its own.

It reads lines of JSON: `{"steps": 2}` is answered with the seconds, and the processor's seconds, that so many steps took,
`{"peak": 1}` with the memory that a step needs beside what it found, `{"test": 1}` with what is left unexplained of activations
it never trains on. All train a TopK autoencoder with Adam, the same rate at every step, float32 weights, unit-norm decoders
where the library has them, and no AuxK.
"""

import contextlib
import ctypes
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor

BATCHES = 6
"""In memory; trained on again and again, in order."""


class Task(NamedTuple):
    """What all of them do."""

    latents: int
    batch: int
    width: int
    k: int
    steps: int

    @property
    def rate(self) -> float:
        return 2e-4 / (self.latents / 2**14) ** 0.5

    @cache  # noqa: B019
    def data(self) -> Tensor:
        """Sparse sums of 2,048 directions, with a little noise; the last batch is for the test."""
        generator, shape = torch.Generator().manual_seed(0), (BATCHES + 1, self.batch, self.width)
        directions = torch.nn.functional.normalize(torch.randn(2048, self.width, generator=generator), dim=-1)
        often, x = 0.1 * torch.arange(1, 2049) ** -0.5, torch.empty(shape)
        for batch in x:
            fires = torch.rand(self.batch, 2048, generator=generator) < often
            batch.copy_(fires.float() @ directions)
        x += 0.05 * x.std() * torch.randn(shape, generator=generator)
        return x * (self.width**0.5 / x.norm(dim=-1).mean())


Trainer = tuple[Callable[[Tensor, int], Any], Callable[[Tensor], Tensor]]
"""A step on a batch, and a reconstruction."""


def steerlib(task: Task, precision: Any = "fp32") -> Trainer:
    from steerlib.training.fit.encoder_recipe import EncoderRecipe
    from steerlib.training.fit.learner import Learner

    recipe = EncoderRecipe(
        kind="topk", latents=task.latents, k=task.k, batch=task.batch, rate=task.rate, warmup=0.0, decay=0.0, auxk=0.0,
        normalise="none", precision=precision,
    )  # fmt: skip
    learner = Learner(recipe, task.data()[0], None, task.steps)
    return (
        lambda x, step: learner.learn(learner.outcome(x, None, step), step),
        lambda x: learner.encoder().reconstruct(x),  # type: ignore[attr-defined]
    )


def steerlib_bf16(task: Task) -> Trainer:
    return steerlib(task, "bf16")


def sparsify(task: Task, autocast: bool = False) -> Trainer:
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    coder = SparseCoder(task.width, SparseCoderConfig(num_latents=task.latents, k=task.k))
    coder.b_dec.data = task.data()[0].mean(0)
    adam, since = torch.optim.Adam(coder.parameters(), lr=task.rate), torch.zeros(task.latents, dtype=torch.long)

    def step(x: Tensor, _: int) -> None:
        """The body of its Trainer's loop, which itself needs a language model."""
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        fired = torch.zeros(task.latents, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since.add_(len(x))
        since[fired] = 0

    return step, lambda x: coder(x).sae_out


def sparsify_autocast(task: Task) -> Trainer:
    return sparsify(task, autocast=True)


def dictionary_learning(task: Task) -> Trainer:
    sys.modules["nnsight"] = MagicMock(spec=ModuleType)  # it is for reading models, and wants another transformers
    sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    trainer = TopKTrainer(
        steps=10**6, activation_dim=task.width, dict_size=task.latents, k=task.k, layer=0, lm_name="", lr=task.rate,
        auxk_alpha=0.0, warmup_steps=0, device="cpu", seed=0,
    )  # fmt: skip
    return (lambda x, step: trainer.update(step, x)), lambda x: trainer.ae(x)


def saelens(task: Task) -> Trainer:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    config = TopKTrainingSAEConfig(d_in=task.width, d_sae=task.latents, k=task.k, aux_loss_coefficient=0.0)
    sae = TopKTrainingSAE(config)
    sae.b_dec.data = task.data()[0].mean(0)
    settings = SAETrainerConfig(
        total_training_samples=task.batch * 10**6,
        train_batch_size_samples=task.batch,
        lr=task.rate,
        lr_end=task.rate,
        device="cpu",
    )
    trainer = SAETrainer(settings, sae, iter(()))

    def step(x: Tensor, _: int) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step, lambda x: sae(x)


def encode_product(task: Task) -> Trainer:
    """The least that any of them has to do."""
    weight, bias = torch.randn(task.latents, task.width), torch.zeros(task.latents)
    return (lambda x, _: torch.nn.functional.linear(x, weight, bias)), lambda x: torch.zeros_like(x)


CONTESTANTS: dict[str, Callable[[Task], Trainer]] = {
    "steerlib": steerlib,
    "steerlib again": steerlib,
    "steerlib bf16": steerlib_bf16,
    "sparsify": sparsify,
    "sparsify autocast": sparsify_autocast,
    "dictionary_learning": dictionary_learning,
    "saelens": saelens,
    "encode product": encode_product,
}


def resident(name: str) -> float:
    """MiB of this process that are in memory (`VmRSS`), or were at most since the count began (`VmHWM`)."""
    return int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def peak_of(run: Callable[[], Any]) -> float:
    """MiB that something needs at its height, beside what was there before and is not given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def main(name: str, task: Task) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, done = task.data(), 0
    step, reconstruct = CONTESTANTS[name](task)
    test = data[-1]
    answer: dict[str, float] = {}
    for line in sys.stdin:
        asked = json.loads(line)

        def run(count: int) -> None:
            nonlocal done
            for _ in range(count):
                step(data[done % BATCHES], done)
                done += 1

        if "steps" in asked:
            gc.collect()
            start, busy = time.perf_counter(), time.process_time()
            run(asked["steps"])
            answer = {"seconds": time.perf_counter() - start, "busy": time.process_time() - busy}
        if "peak" in asked:
            answer = {"peak": peak_of(lambda: run(1))}
        if "test" in asked:
            with torch.no_grad():
                kept = torch.cat([reconstruct(part) for part in test.split(1024)]).float()
            answer = {"unexplained": float((test - kept).square().sum() / (test - test.mean(0)).square().sum())}
        print("ANSWER " + json.dumps({**answer, "done": done}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Task(*map(int, sys.argv[2:])))
