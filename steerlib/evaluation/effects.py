"""What `Concept.effects` holds, by kind of concept: the one place that names its keys. Values are plain JSON.

A concept has the keys of one kind. All that a bank's reader may rely on is that a key which is there has this type.
"""

from typing import Any, TypedDict


class Example(TypedDict):
    """A prompt and its answers."""

    prompt: str
    unsteered: str
    prompted: str
    steered: str


class MeasuredEffects(TypedDict):
    """Of a concept of a language model, as `training.calibrate.measure` measured it on the recipe's evaluation prompts.

    Attributes:
        concept, label: Its name and meaning.
        site: Where it is moved; sites of several layers with spaces between.
        method: The method that made it.
        amount: Its useful amount, in units, at which everything was measured.
        instruction: The words it is compared with.
        answers: Answers of each condition.
        moved: Share of prompts on which it raises the concept.
        conditions: By condition (`unsteered`, `prompted`, `steered`, controls, methods): `score`, `concept`, `relevance`,
            `fluency`, `joint`, `ratio`, `nll`, `distinct`, `specificity`, and side effects `kl`, `loss`, `agreement`.
        joint: By condition, the joint score of each prompt.
        response: How the concept follows the dose (`evaluation.comparison.Response`).
        examples: Some answers.
        tried: Every setting that was tried: method, site, strength, joint score.
        passes: By bar that a shipped concept has to clear, whether it does.
        also: The same of bars that are reported and not required.
    """

    concept: str
    label: str
    site: str
    method: str
    amount: float | None
    instruction: str
    answers: int
    moved: float
    conditions: dict[str, dict[str, float]]
    joint: dict[str, list[float]]
    response: dict[str, Any]
    examples: list[Example]
    tried: list[list[Any]]
    passes: dict[str, bool]
    also: dict[str, bool]


class DetectorEffects(TypedDict):
    """Of a concept that reads where something is present: precision and recall by token, and on how many tokens."""

    precision: float
    recall: float
    tokens: int


class Verified(TypedDict):
    """What moving a latent did to the tokens that follow it, in nats (`training.label.verify.Verification`)."""

    tokens: list[str]
    holds: bool
    gain: float
    others: float
    highest: float


class LatentEffects(TypedDict, total=False):
    """Of a latent of a sparse encoder.

    Attributes:
        frequency: Share of tokens that it fires on.
        promotes: Tokens that the model's own head makes likelier by its decoder row.
        histogram: `first` filled bin and `counts` from there on, of its positive readings (`training.label.labels`).
        verified: What moving it did.
        correlation: Of its readings with what its label says.
        overlap: Intersection over union of where it fires and where what its label says is.
    """

    frequency: float
    promotes: list[str]
    histogram: dict[str, Any]
    verified: Verified
    correlation: float
    overlap: float


class PictureEffects(TypedDict, total=False):
    """Of a lever of a diffusion model: the edit that was chosen (`"Set"` or `"Add"`) and its amount in units, the figures it
    was measured by, and by bar whether it clears it."""

    edit: str
    amount: float
    passes: dict[str, bool]
