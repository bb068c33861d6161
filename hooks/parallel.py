"""Models that several processes run together: where each has only a part of a tensor, there is nothing to steer."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from steerlib.sites import Site


def why_split(inside: Sequence[nn.Module], site: Site) -> str:
    """Why a site cannot be steered, by the modules that its path leads through, the model first; "" where each process has all
    of its tensor. The weights tell; those of blocks that are sharded as a whole (FSDP) are all there while they run."""
    split = (getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None) for module in inside)
    if site.mean and any(one is not None for one in split):
        return f"site {site.name!r}: this model is split over processes along the tokens (context parallelism); {REMEDY}"
    plan: Any = getattr(inside[0], "_tp_plan", None) if (getattr(inside[0], "_tp_size", None) or 1) > 1 else None
    plan = plan or {}
    if any("sequence" in way for way in plan.values()):
        return f"site {site.name!r}: this model is split over processes along the tokens (sequence parallelism); {REMEDY}"
    weight: Any = getattr(inside[-1], "weight", None)
    if not (placements := getattr(weight, "placements", ())):
        return ""
    is_table = isinstance(inside[-1], nn.Embedding)
    is_whole = any(cls.__name__ == "FSDPModule" for module in inside for cls in type(module).__mro__)
    is_gathered = site.side == "output" and "gather" in plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", site.module), "")
    if weight.ndim != 2 or is_gathered or (is_whole and weight.device_mesh.ndim == 1):
        return ""
    axis = 1 if (site.side == "input") != is_table else 0
    if not any(one.is_shard(axis) for one in placements) or (is_table and site.side == "input"):
        return ""
    return (
        f"site {site.name!r}: {site.module!r} is split over processes (tensor parallelism), each of which has only its own "
        f"columns of this tensor; {REMEDY}"
    )


REMEDY = "steer where all is together, such as the output of the attention or of a block, or load the model whole"
