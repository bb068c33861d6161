"""Train a text-to-image pipeline on pictures whose causes are known, until its own show what was asked for.

Any pipeline with a U-Net, a text encoder, an autoencoder and a scheduler that has velocities. A run that is killed goes on from
its last checkpoint; every batch is a function of seed and step, so it ends as if nothing had happened. `B` pictures.

    folder/words.safetensors      the text encoder after `wording`
    folder/state.safetensors      weights, their running mean and the optimizer's memory
    folder/curve.jsonl            a line a look: loss, images/s, share of each factor drawn as asked
    folder/samples/000100000.png  what was asked for, over what was drawn
    folder/pipeline/              the pipeline with the running mean, to be loaded with `from_pretrained`
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from scenes.wording import APART, Course, learn_words, tokens
from steerlib.training import store


@dataclass(frozen=True)
class PaintingRecipe:
    """All that the result depends on, but for the pipeline.

    Attributes:
        images: pictures to learn from, at most.
        batch: pictures a step, all processes together.
        lr: learning rate of the denoiser; it falls to nothing over the last fifth.
        lr_text: learning rate of the text encoder.
        words: steps of 128 captions for the text encoder alone, before.
        warmup: steps over which the learning rates rise.
        ema: how much of the running mean of weights a step leaves.
        drop: how often a caption leaves each thing unsaid.
        unconditional: how often it says nothing at all, for guidance.
        faces: share of pictures of scenes that are parts of faces.
        emphasis: weight in the loss of pixels that show more than a background: the fewer ones, and most of what captions say.
        gamma: where the weight of noise levels stops growing with their signal-to-noise ratio (Hang et al. 2023, eq. 7).
        seed: of everything drawn at random.
    """

    images: int = 500_000
    batch: int = 32
    lr: float = 8e-4
    lr_text: float = 1e-4
    words: int = 2000
    warmup: int = 300
    ema: float = 0.999
    drop: float = 0.15
    unconditional: float = 0.1
    faces: float = 0.1
    emphasis: float = 4.0
    gamma: float = 5.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.images // self.batch

    def rate_at(self, step: int) -> float:
        """Share of the learning rate at a step."""
        return min(1.0, (step + 1) / self.warmup, 5 * (1 - step / self.steps))


# -- batches ---------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Pictures and what is said of them."""

    pixels: NDArray[np.uint8]
    """`[B, 32, 32, 3]`"""
    weight: NDArray[np.float32]
    """`[B, 32, 32]`, 1 on average."""
    captions: list[str]


class Look(NamedTuple):
    """What was asked for and what was drawn, `[B, 32, 32, 3]` each, and the share of each factor drawn as asked."""

    asked: NDArray[np.uint8]
    drawn: NDArray[np.uint8]
    figures: dict[str, float]


class Subject(NamedTuple):
    """What a pipeline learns to draw."""

    words: Sequence[str]
    """Words of its captions."""
    course: Course
    """By which the text encoder learns them."""
    batch: Callable[..., Batch]
    """Of a recipe, a number of pictures and a seed of whole numbers."""
    look: Callable[[Any, int, tuple[int, ...]], Look]
    """At a number of pictures that a pipeline draws for captions of a seed."""
    asked: tuple[str, ...]
    """Factors that decide when a model is good enough."""


def weighed(
    captions: Sequence[str], pixels: NDArray[np.uint8], plain: NDArray[np.bool_], recipe: PaintingRecipe, *seed: int
) -> Batch:
    """A batch; `plain[B, 32, 32]` are pixels of a background. Some captions are made to say nothing."""
    silent = np.random.default_rng((5, recipe.seed, *seed)).random(len(pixels)) < recipe.unconditional
    weight = np.where(plain, 1.0, recipe.emphasis)
    said = ["" if quiet else caption for quiet, caption in zip(silent, captions, strict=True)]
    return Batch(pixels, (weight / weight.mean()).astype(np.float32), said)


def levels(scheduler: Any, gamma: float) -> Float[Tensor, " T"]:
    """How often each noise level is trained on: velocity errors weighed by `min(SNR + 1, gamma) / (SNR + 1)`."""
    a = scheduler.alphas_cumprod.double()
    share = 1 / (1 - a)  # SNR + 1
    return (share.clamp(max=gamma) / share).float()


class Painter(nn.Module):
    """The parts of a pipeline that learn, and what they learn from a batch."""

    def __init__(self, pipe: Any, gamma: float):
        super().__init__()
        self.text, self.unet = pipe.text_encoder, pipe.unet
        self.scheduler, self.odds = pipe.scheduler, levels(pipe.scheduler, gamma)

    def forward(
        self, latents: Float[Tensor, "B C H W"], ids: Int[Tensor, "B N"], weight: Float[Tensor, "B H W"], g: torch.Generator
    ) -> Tensor:
        """Mean squared error of the velocity (Salimans & Ho 2022), at noise levels drawn for each picture."""
        t = torch.multinomial(self.odds, len(latents), replacement=True, generator=g).to(latents.device)
        noise = torch.randn(latents.shape, generator=g).to(latents)
        noisy, aim = self.scheduler.add_noise(latents, noise, t), self.scheduler.get_velocity(latents, noise, t)
        found = self.unet(noisy, t, encoder_hidden_states=self.text(ids)[0]).sample
        return ((found - aim).square().mean(1) * weight).mean()


@torch.no_grad()
def inputs(pipe: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, token ids and weights of a batch, on the pipeline's device."""
    device, scale = pipe.unet.device, pipe.vae.config.scaling_factor
    x = torch.from_numpy(batch.pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipe.vae.encode(x.to(pipe.vae.dtype)).latent_dist.mean.float() * scale
    return latents, tokens(pipe.tokenizer, batch.captions).to(device), torch.from_numpy(batch.weight).to(device)


@torch.no_grad()
def noised(pipe: Any, pixels: NDArray[np.uint8], captions: Sequence[str], levels: Sequence[int], *, seed: int) -> None:
    """Run a denoiser on pictures `[B, H, W, 3]` with the noise of each level added; hooks record what it computes."""
    x = torch.from_numpy(pixels).to(pipe.unet.device, pipe.unet.dtype).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
    text = pipe.text_encoder(tokens(pipe.tokenizer, list(captions)).to(latents.device))[0]
    for level in levels:
        g = torch.Generator().manual_seed(seed * 1009 + level)
        noise = torch.randn(latents.shape, generator=g).to(latents)
        t = torch.full((len(latents),), level, device=latents.device)
        pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=text)


# -- training --------------------------------------------------------------------------------------------------


class Run:
    """A run in a folder: where it is, and all that its next step depends on."""

    def __init__(self, pipe: Any, subject: Subject, recipe: PaintingRecipe, folder: Path, accelerator: Any):
        self.pipe, self.subject, self.recipe, self.folder, self.accelerator = pipe, subject, recipe, folder, accelerator
        self.step, self.first = 0, accelerator.is_main_process
        self.painter = Painter(pipe, recipe.gamma).train().requires_grad_(True)
        groups = [{"params": list(part.parameters()), "full": lr} for part, lr in self._parts]
        adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.whole, self.adam = accelerator.prepare(self.painter, adam)
        self.weights = dict(self.painter.named_parameters())
        self.mean = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @property
    def _parts(self) -> list[tuple[nn.Module, float]]:
        return [(self.painter.unet, self.recipe.lr), (self.painter.text, self.recipe.lr_text)]

    def learn(self) -> Tensor:
        """One step; its loss."""
        recipe, rank = self.recipe, self.accelerator.process_index
        batch = self.subject.batch(recipe, recipe.batch // self.accelerator.num_processes, self.step, rank)
        g = torch.Generator().manual_seed((recipe.seed * 2**32 + self.step) * 1024 + rank)
        loss = self.whole(*inputs(self.pipe, batch), g)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.painter.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["full"] * recipe.rate_at(self.step)
        self.adam.step()
        self.adam.zero_grad()
        self.step += 1
        keep = min(recipe.ema, self.step / (10 + self.step))
        for name, weight in self.weights.items():
            self.mean[name].lerp_(weight.detach(), 1 - keep)
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The pipeline with the running mean of its weights, for as long as it is looked at."""
        own = {name: weight.detach().clone() for name, weight in self.weights.items()}
        try:
            self._put(self.mean)
            self.painter.eval()
            yield self.pipe
        finally:
            self._put(own)
            self.painter.train()

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    # -- what is kept ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint."""
        if self.first:
            kept = {f"weight {name}": weight.detach() for name, weight in self.weights.items()}
            kept |= {f"mean {name}": mean for name, mean in self.mean.items()}
            for name, weight in self.weights.items():
                kept |= {f"{key} {name}": value for key, value in self.adam.state[weight].items()}
            store.save(self.folder / "state.safetensors", kept, {"step": str(self.step)})
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        kept = load_file(path, device=str(self.accelerator.device))
        self._put({name: kept[f"weight {name}"] for name in self.weights})
        self.mean = {name: kept[f"mean {name}"] for name in self.weights}
        for name, weight in self.weights.items():
            memory = {key.partition(" ")[0]: t for key, t in kept.items() if key.endswith(f" {name}")}
            self.adam.state[weight] = {key: t for key, t in memory.items() if key not in ("weight", "mean")}


def paint(
    pipe: Any,
    subject: Subject,
    recipe: PaintingRecipe,
    folder: Path,
    *,
    accelerator: Any,
    goal: float = 0.96,
    look_every: int = 20_000,
    save_every: int = 400,
    look_at: int = 64,
    looked: Callable[[Path], None] = lambda _: None,
) -> dict[str, float]:
    """Train until the least of `subject.asked` is drawn right in `goal` of the cases, twice in a row, or for all images.

    Looks at `look_at` pictures every `look_every`, and calls `looked` with the folder; keeps a checkpoint every `save_every`
    steps. Gives the figures of the last look.
    """
    pipe.to(accelerator.device)
    begin(pipe, subject, recipe, folder, accelerator)
    run = Run(pipe, subject, recipe, folder, accelerator)
    run.restore()
    curve = [line for line in _lines(folder / "curve.jsonl") if line["images"] <= run.step * recipe.batch]
    steps_a_look, losses, since = max(1, look_every // recipe.batch), [], time.perf_counter()
    with tqdm(total=recipe.images, initial=run.step * recipe.batch, unit="img", disable=not run.first) as bar:
        while run.step < recipe.steps and not good_enough(curve, subject.asked, goal):
            losses.append(run.learn())
            bar.update(recipe.batch)
            if run.step % 20 == 0:
                bar.set_postfix(loss=f"{_mean(losses[-20:]):.4f}", refresh=False)
            if run.step % steps_a_look == 0 or run.step == recipe.steps:
                pace = len(losses) * recipe.batch / (time.perf_counter() - since)
                figures = {"images": run.step * recipe.batch, "images_per_second": pace, "loss": _mean(losses)}
                curve.append(figures | look(run, look_at))
                run.save()
                _keep(run, curve, looked)
                losses, since = [], time.perf_counter()
            elif run.step % save_every == 0:
                run.save()
    return curve[-1] if curve else {}


def begin(pipe: Any, subject: Subject, recipe: PaintingRecipe, folder: Path, accelerator: Any) -> None:
    """A text encoder that has learned its words, from the folder if it is there."""
    path = folder / "words.safetensors"
    if accelerator.is_main_process and not path.exists():
        found = learn_words(pipe, subject.course, steps=recipe.words, seed=recipe.seed)
        store.save(path, pipe.text_encoder.state_dict())
        (folder / "words.json").write_text(json.dumps(found, indent=1) + "\n")
    accelerator.wait_for_everyone()
    pipe.text_encoder.load_state_dict(load_file(path))


def good_enough(curve: Sequence[Mapping[str, float]], asked: Sequence[str], goal: float) -> bool:
    """Whether the last two looks found what was asked for."""
    return len(curve) >= 2 and all(line[name] >= goal for line in curve[-2:] for name in asked)


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _mean(losses: Sequence[Tensor]) -> float:
    return float(torch.stack([*losses]).mean())


def _keep(run: Run, curve: Sequence[Mapping[str, float]], looked: Callable[[Path], None]) -> None:
    """The curve, and a pipeline to try out; the first process writes them."""
    if not run.first:
        return
    with store.whole(run.folder / "curve.jsonl") as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in curve))
    with store.whole(run.folder / "pipeline") as part, run.averaged() as pipe:
        pipe.save_pretrained(part)
    looked(run.folder)
    tqdm.write(json.dumps(curve[-1]))


# -- looking ---------------------------------------------------------------------------------------------------


def look(run: Run, n: int) -> dict[str, float]:
    """What pictures show for captions never trained on; writes some of them down."""
    if not run.first:
        return _shared(run, {})
    with run.averaged() as pipe:
        seen = run.subject.look(pipe, n, (run.recipe.seed, APART))
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    save_grid(seen.asked[:32], seen.drawn[:32], folder / f"{run.step * run.recipe.batch:09d}.png")
    return _shared(run, seen.figures)


def _shared(run: Run, found: dict[str, float]) -> dict[str, float]:
    """The first process's figures, in all processes."""
    if run.accelerator.num_processes > 1:
        box = [found]
        torch.distributed.broadcast_object_list(box)
        return box[0]
    return found


def save_grid(above: NDArray[np.uint8], below: NDArray[np.uint8], path: Path) -> None:
    """Rows of sixteen pictures, each over its counterpart, three times as large."""
    from PIL import Image

    rows = [row[k : k + 16] for k in range(0, len(above), 16) for row in (above, below)]
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows if len(row) == min(16, len(above))], 0)
    Image.fromarray(sheet).resize((sheet.shape[1] * 3, sheet.shape[0] * 3), 0).save(path)
