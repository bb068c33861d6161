"""A CLIP model as the judge of pictures: how near they are to what is said of them (Radford et al. 2021, arXiv 2103.00020)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ..devices import best_device
from ..errors import BadRecipe, MissingExtra, UnsupportedTarget
from .pictures import Pictures

BATCH = 32
"""Pictures that are looked at together."""


class ClipScore:
    """How much each of some pictures shows a concept, for `score=` of `sl.make` and `sl.train`: the cosine of what a CLIP model
    makes of the picture and of the concept's name.

    Args:
        model: a `CLIPModel` of transformers; or where one is: a folder, or an id on the Hub, from which it is downloaded.
        processor: its `CLIPProcessor`. Default: the one that lies with the model.
        template: what is said of a picture, with `{concept}` in it.

    Called with pictures, bytes `[B, H, W, 3]`, and the name of a concept, it gives `[B]` numbers from -1 to 1. Raises
    `BadRecipe` for a template without `{concept}`, `UnsupportedTarget` for another model or without a processor, and
    `MissingExtra` where transformers is not installed.

    >>> score = sl.ClipScore("openai/clip-vit-base-patch32", template="a picture of {concept}")      # doctest: +SKIP
    >>> bank = sl.make(pipe, ["a castle by night"], score=score)                                     # doctest: +SKIP
    """

    def __init__(self, model: Any, processor: Any = None, *, template: str = "{concept}"):
        if "{concept}" not in template:
            raise BadRecipe(f"expected a template with {{concept}} in it, got {template!r:.80}")
        if isinstance(model, str | os.PathLike):
            model, processor = _loaded(os.fspath(model), processor)
        if getattr(getattr(model, "config", None), "model_type", "") != "clip" or processor is None:
            raise UnsupportedTarget(
                f"expected a CLIPModel and its CLIPProcessor, or where they are, got {type(model).__name__} and "
                f"{type(processor).__name__}"
            )
        self.model, self.processor, self.template = model.eval(), processor, template
        self.__name__ = f"CLIP {Path(model.name_or_path).name or 'model'}"

    @torch.no_grad()
    def __call__(self, pictures: Pictures, concept: str) -> Float[np.ndarray, " B"]:
        said, found = self.template.replace("{concept}", concept), []
        for start in range(0, len(pictures), BATCH):
            some: Sequence[Any] = [*pictures[start : start + BATCH]]
            given = self.processor(text=[said], images=some, return_tensors="pt", padding=True).to(self.model.device)
            made = self.model(**given)
            found.append((made.image_embeds @ made.text_embeds[0]).float().cpu())
        return torch.cat(found).numpy()


def _loaded(source: str, processor: Any) -> tuple[Any, Any]:
    try:
        from transformers import AutoProcessor, CLIPModel
    except ImportError:
        raise MissingExtra("CLIP needs transformers: pip install 'steerlib[transformers]'") from None
    model: Any = CLIPModel.from_pretrained(source)
    return model.to(best_device()), processor or AutoProcessor.from_pretrained(source)
