"""What one call of a denoiser is about: the noisy image, its noise level, the size of its latent, the tokens of its text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.passes import Grid

from .families import Denoiser

_NUMBERS: WeakKeyDictionary[Any, dict[str, tuple[Tensor, Any]]] = WeakKeyDictionary()


@dataclass
class DenoiserCall:
    """One call of a denoiser.

    Args:
        pipe: the pipeline that makes it.
        module: the denoiser.
        facts: what is special about it.
        given: its arguments, by name.
        names: local names of the pipeline's loop; empty outside one.
    """

    pipe: Any
    module: nn.Module
    facts: Denoiser
    given: Mapping[str, Any]
    names: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sample(self) -> Any:
        """The noisy images: a tensor `[B, ...]`, or a list of one tensor each."""
        return self._first(self.facts.sample)

    @property
    def first(self) -> Tensor:
        """The first tensor of noisy images."""
        return self.sample if isinstance(self.sample, Tensor) else self.sample[0]

    def _first(self, names: tuple[str, ...]) -> Any:
        return next(self.given[name] for name in names if self.given.get(name) is not None)

    @property
    def train_steps(self) -> int:
        """Timesteps of the scheduler's training."""
        return int(getattr(getattr(self.pipe.scheduler, "config", None), "num_train_timesteps", 1000))

    @property
    def noise(self) -> Any:
        """The noise level, from 1, pure noise, to 0, in the form in which the time was given."""
        return self.facts.noise(self._first(self.facts.time), self.train_steps)

    @property
    def moment(self) -> tuple[float, float, int]:
        """The time of this call, the progress it means, and which of the scheduler's noise levels it is."""
        names: Any = self.names
        run, index, t = names.get("timesteps"), names.get("i"), names.get("t")
        counted = isinstance(run, Tensor) and isinstance(index, int) and index < len(run)
        times, whole = self._times("run", run if counted else None), self._times("all", self.pipe.scheduler.timesteps)
        if counted and isinstance(t, Tensor):
            time = times[index]  # the list is on the CPU, t may not be
        elif isinstance(t, (Tensor, int, float)):
            time = float(t)
        else:
            time = float(torch.as_tensor(self.noise).reshape(-1)[0]) * self.train_steps
        levels = list(dict.fromkeys(times or whole)) or [time]
        step = min(range(len(levels)), key=lambda k: abs(levels[k] - time))
        if whole and not (min(whole) >= 0 and 2 < max(whole) <= self.train_steps):  # other units, as EDM's: count steps
            return time, min(range(len(whole)), key=lambda k: abs(whole[k] - time)) / len(whole), step
        return time, 1 - time / self.train_steps, step

    def _times(self, what: str, times: Tensor | None) -> list[float]:
        return [] if times is None else self._once(what, times, lambda x: [float(t) for t in x.tolist()])

    def _once(self, what: str, tensor: Tensor, numbers: Callable[[Tensor], Any]) -> Any:
        """Numbers of a tensor that stays the same during a run, read from its device once."""
        known = _NUMBERS.setdefault(self.pipe, {})
        if what not in known or known[what][0] is not tensor:
            known[what] = tensor, numbers(tensor)
        return known[what][1]

    @property
    def texts(self) -> int:
        """Tokens of text, which some blocks keep in front of those of the image; -1 where rows differ or it comes last."""
        text, mask = self.given.get("encoder_hidden_states"), self.given.get("encoder_attention_mask")
        if not isinstance(text, Tensor) or text.ndim != 3:
            return 0
        if not self.facts.text_first:
            return -1
        if not isinstance(mask, Tensor) or not self.facts.drops_pads:
            return text.shape[1]
        counts = self._once("texts", mask, lambda x: x.sum(-1).tolist())
        return int(counts[0]) if len({*counts}) == 1 else -1

    @property
    def grid(self) -> Grid | None:
        """Sizes of the latent, from the position ids or sizes given beside it, or from its own axes; None where unknown."""
        given = self.given
        if getattr(getattr(self.module, "_parallel_config", None), "context_parallel_config", None) is not None:
            return None  # each process has only a part of the tokens
        if isinstance(ids := given.get("img_ids"), Tensor):
            return self._once("grid", ids, lambda x: Grid(1, *(int(n) + 1 for n in x.reshape(-1, x.shape[-1])[:, 1:3].amax(0))))
        if isinstance(shapes := given.get("img_shapes"), list):
            return Grid(*(shapes[0] if len(shapes[0]) == 3 else shapes[0][0]))
        if {"num_frames", "height", "width"} <= {*given}:
            return Grid(given["num_frames"], given["height"], given["width"])
        return grid_of(self.first, self.facts)


def grid_of(x: Tensor | None, facts: Denoiser) -> Grid | None:
    """Sizes of an image `[B, D, H, W]` or a video; None for tokens."""
    if x is None or x.ndim not in (4, 5):
        return None
    return Grid(1, *x.shape[-2:]) if x.ndim == 4 else Grid(*(x.shape[axis] for axis in facts.video))
