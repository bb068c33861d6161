"""Activations of a denoiser at noise levels.

A level is named by its timestep; `site@level` names activations as it does encoders. `B` pictures, `N` tokens of a site.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import SiteNotReached
from ...passes import StepState
from ...schedules import Window, windows
from ...steering.recording import conditional, observing

Seen = dict[str, Float[Tensor, "B N D"]]
"""By `site@level`."""


def spans(pipe: Any, levels: Sequence[int]) -> dict[str, Window]:
    """The window of progress of each level, by name: from half-way to the one before to half-way to the next."""
    ordered = sorted(levels, reverse=True)
    return dict(zip(map(str, ordered), windows([moment_of(pipe, level) for level in ordered]), strict=True))


def moment_of(pipe: Any, level: float) -> float:
    """The progress at which a level's noise is left."""
    return 1 - level / pipe.scheduler.config.num_train_timesteps


@torch.no_grad()
def at_levels(pipe: Any, sites: Sequence[str], levels: Sequence[int], run: Callable[[], Any]) -> Seen:
    """What a run shows at sites in the passes nearest to each level, on the conditional half where there is guidance."""
    nearest: dict[str, tuple[float, Tensor]] = {}

    def keeper(site: str) -> Callable[[Tensor, StepState], None]:
        def observe(x: Tensor, state: StepState) -> None:
            if (own := conditional(x, state)) is None or state.progress is None:
                return
            for level in levels:
                off, key = abs(float(state.progress) - moment_of(pipe, level)), f"{site}@{level}"
                if key not in nearest or off < nearest[key][0]:
                    nearest[key] = off, own.detach().clone()

        return observe

    with observing(pipe, {site: keeper(site) for site in sites}):
        run()
    if missed := [site for site in sites if f"{site}@{levels[0]}" not in nearest]:
        raise SiteNotReached(f"the pipeline ran and did not reach {', '.join(missed)}; name sites of its denoiser")
    return {f"{site}@{level}": nearest[f"{site}@{level}"][1] for level in levels for site in sites}


def joined(parts: Sequence[Mapping[str, Tensor]]) -> Seen:
    """What several runs showed, in half precision; the first shows whatever a later one does."""
    return {key: torch.cat([part[key].half().cpu() for part in parts if key in part]) for key in parts[0]}
