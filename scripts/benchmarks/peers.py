"""The same steering by other libraries, where they are installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .measurement import Condition


def peer_conditions(model: Any, vectors: Mapping[int, torch.Tensor]) -> dict[str, Condition]:
    """Adding one vector at each of some layers, by library; says which of them cannot run here."""
    found: dict[str, Condition] = {}
    for name, make in {"steering-vectors": steering_vectors, "repeng": repeng}.items():
        try:
            found[name] = make(model, vectors)
        except (ImportError, AttributeError) as error:  # repeng needs NumPy 1
            print(f"{name} cannot run here: {error}")
    return found


def steering_vectors(model: Any, vectors: Mapping[int, torch.Tensor]) -> Condition:
    from steering_vectors import SteeringVector  # type: ignore[import-not-found]

    vector = SteeringVector(dict(vectors), "decoder_block")
    return lambda: vector.apply(model)


def repeng(model: Any, vectors: Mapping[int, torch.Tensor]) -> Condition:
    from repeng import ControlModel, ControlVector  # type: ignore[import-not-found]

    control = ControlVector("llama", {layer: v.numpy() for layer, v in vectors.items()})

    @contextmanager
    def controlled() -> Iterator[None]:
        wrapped = ControlModel(model, list(vectors))
        try:
            wrapped.set_control(control, 1.0)
            yield
        finally:
            wrapped.unwrap()

    return controlled
