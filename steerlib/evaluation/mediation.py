"""How much of what a prompt does to the output goes through some concepts: text, pictures and decoders of pictures alike."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept
from ..graph.effects import Effects, effects
from ..steering.interventions import Patch
from ..steering.recording import record
from ..steering.session import steer


def mediation(
    target: object,
    bank: ConceptBank,
    concepts: Sequence[str],
    run: Callable[[Any], Tensor],
    *,
    value: Any,
    reference: Any,
    branch: Any = "both",
) -> Effects:
    """Effects of a prompt `value` rather than `reference` on an outcome, by way of concepts and around them (Pearl 2001).

    `run(prompt)` runs the target, the same way each time but for the prompt, and gives the outcome `[B, ...]`, of which the
    mean over `B` is taken. It is called four times. Mediators are the readings of all places of the concepts, put back pass by
    pass (in text by position, in images by noise level): `tie` is what the prompt does through them, `nde` what it does else.

    A concept whose `tie` is nothing is no lever of that prompt's effect, however well its readings tell prompts apart.
    """
    places, names = places_of(bank, concepts)

    def once(do: Mapping[str, Any]) -> dict[str, Any]:
        held = {name: Patch({name: do[name]}) for name in names if name in do}
        steered = steer(target, places, held, branch=branch, allow_ood=True) if held else nullcontext()
        with record(target, places, names) as tape, steered:
            return {"outcome": run(do["prompt"]), **tape}

    return effects(once, "prompt", "outcome", names, value=value, reference=reference)


def places_of(bank: ConceptBank, concepts: Sequence[str]) -> tuple[ConceptBank, list[str]]:
    """A bank with a concept for each place of some concepts, beside its own, and their names."""
    alone = [
        Concept(name=f"{name}, place {i}", encoder=place.encoder, index=place.index, unit=place.unit)
        for name in concepts
        for i, place in enumerate(bank[name].places)
    ]
    return bank.with_concepts([*bank.concepts.values(), *alone]), [concept.name for concept in alone]
