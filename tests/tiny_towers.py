"""Classes of transformers that read pictures, sound or series at toy size, and something that each of them takes."""

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers
from tiny_models import GIVEN, MOST, TINY, VARIANTS, CannotBuild, shrunk
from transformers.models.auto import modeling_auto

from steerlib.hooks.modules import arguments

SIZES = {"image_size": 16, "patch_size": 4, "num_mel_bins": 8, "max_source_positions": 20, "codebook_size": 16}
SIZES |= {"depth": 2, "embed_dim": 32, "vision_feature_layer": -1}
INPUTS = ("pixel_values", "input_features", "input_values", "past_values")
IDS = torch.tensor([[3, 4, 5, 6, 7], [3, 6, 7, 8, 9]])
NAMES = {
    name: None
    for mapping, names in vars(modeling_auto).items()
    if mapping.startswith("MODEL") and mapping.endswith("MAPPING_NAMES") and "FOR_CAUSAL_LM" not in mapping
    for found in names.values()
    for name in ([found] if isinstance(found, str) else found)
}
"""Every class that an auto class of transformers knows, but its causal language models."""


def bodies() -> list[str]:
    """Classes without a head that take pictures, sound or series by a name of their own."""
    found = modeling_auto.MODEL_MAPPING_NAMES.values()
    names = sorted({name for names in found for name in ([names] if isinstance(names, str) else names)})
    return [name for name in names if (cls := class_of(name)) and {*INPUTS} & {*inspect.signature(cls.forward).parameters}]


def writers() -> list[str]:
    """Classes with `generate()`."""
    causal = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    return [name for name in NAMES if name not in causal and getattr(class_of(name), "can_generate", bool)()]


def class_of(name: str) -> Any:
    """The class of this name; None where what it needs is not installed."""
    try:
        found = getattr(transformers, name, None)
        return found if found is None or found.config_class else None
    except ImportError:
        return None


@cache
def model_of(name: str) -> Any:
    """A model of this class, seeded, in evaluation mode; raises `CannotBuild`."""
    cls, reasons, sizes = class_of(name), [], {**TINY, **SIZES}
    if cls is None:
        raise CannotBuild(f"{name}: not in this installation")
    for variant in VARIANTS:
        try:
            given = variant | GIVEN.get(cls.config_class.model_type, {})
            config = shrunk(cls.config_class(), sizes=sizes, **given)
            with torch.device("meta"):
                if (size := sum(p.numel() for p in cls(config).parameters())) > MOST:
                    raise ValueError(f"{size:,} parameters at toy size")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return cls(config).eval()
        except Exception as error:  # whatever a foreign class raises
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split()):.160}")
    raise CannotBuild(f"{name}: {reasons[0]}")


def inputs_of(model: Any) -> Iterator[dict[str, Any]]:
    """Calls by keyword that a model may take, the likeliest first."""
    config = model.config
    parts = [*(getattr(config, name, None) for name in config.sub_configs), config]

    def size(default: int, *names: str) -> int:
        found = (getattr(part, name, None) for name in names for part in parts)
        value = next((v for v in found if isinstance(v, int | list | tuple)), default)
        return value if isinstance(value, int) else int(value[0])

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    side, channels, frames = size(16, "image_size"), size(3, "num_channels"), size(2, "num_frames")
    side = side if side <= 448 else 32  # larger ones take minutes
    mel, long = (
        size(8, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels"),
        2 * size(20, "max_source_positions"),
    )
    shapes = {
        "pixel_values": [(2, channels, side, side), (2, frames, channels, side, side), (2, 3, 32, 32), (2, 3, 64, 64)],
        "input_features": [(2, mel, long), (2, long, mel), (2, 64, mel), (2, mel, 64)],
        "input_values": [(2, 400), (2, 1, 400), (2, size(64, "max_length"), mel), (2, 2000)],
        "past_values": [(2, size(32, "context_length"), size(1, "num_input_channels")), (2, size(32, "context_length"))],
    }
    given = arguments(model)
    main = model.main_input_name if model.main_input_name in shapes else next((n for n in shapes if n in given), "")
    for shape in shapes.get(main, []):
        if "decoder_input_ids" in given:
            yield {main: random(*shape), "decoder_input_ids": IDS[:, :3]}
        if "input_ids" in given:
            yield {main: random(*shape), "input_ids": IDS}
        yield {main: random(*shape)}
