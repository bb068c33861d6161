"""What `Concept.effects` holds, by kind of concept: the one place that names its keys. Values are plain JSON.

A concept has the keys of one kind. All that a bank's reader may rely on is that a key which is there has this type.
"""

from typing import Any, NotRequired, TypedDict


class Example(TypedDict):
    """A prompt and its answers; `reversed` is that with the concept moved the other way, where its range allows."""

    prompt: str
    unsteered: str
    prompted: str
    steered: str
    reversed: NotRequired[str]


class MeasuredEffects(TypedDict):
    """Of a concept of a language model at its useful `amount`, and at the `least` one, in units (`training.calibrate.measure`).

    By condition (unsteered, prompted, steered, controls, methods), `conditions` holds mean scores and side effects, `joint` the
    joint score of each prompt, `before` the same without its terms for repetition and language, `greedy` that of greedy
    answers, and `loops` their share of repeated trigrams. `moved` is the share of prompts on which steering raises the concept,
    `response` a `comparison.Response`, `tried` every setting with its joint score. `passes` and `also` say whether it clears
    each bar: those that a shipped concept has to clear, and those that are only reported.
    """

    concept: str
    label: str
    site: str
    method: str
    amount: float | None
    least: float
    instruction: str
    answers: int
    moved: float
    conditions: dict[str, dict[str, float]]
    joint: dict[str, list[float]]
    before: dict[str, list[float]]
    greedy: dict[str, list[float]]
    loops: dict[str, float]
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

    `frequency` is the share of tokens that it fires on, `promotes` the tokens that the model's own head makes likelier by it.
    `correlation` is that of its readings with what its label says.
    """

    frequency: float
    promotes: list[str]
    histogram: dict[str, Any]
    verified: Verified
    correlation: float


class PictureEffects(TypedDict, total=False):
    """Of a concept of a diffusion model, what is stated in `training.calibrate.prompted`: the chosen edit, `"Set"` or `"Add"`,
    and its amount in units; `effect` and `damage` of that edit; `told`, the share of prompted pictures that are told from plain
    ones; `saturated`, the shares of saturated pixels of steered and plain pictures; the edit that removes it best, `removal`
    with its `removal_amount` (of `Scale` the factor), and the effect of that, `removed`; and who scored it, `scorer`.
    """

    edit: str
    amount: float
    effect: float
    damage: float
    told: float
    saturated: list[float]
    removal: str
    removal_amount: float
    removed: float
    scorer: str


class CoordinateEffects(TypedDict, total=False):
    """Of a coordinate of a decoder (`evaluation.coordinates.Coordinate`, which explains them)."""

    ces: float
    specificity: float | None
    relative: float | None
    low: float | None
    high: float | None
    control: float | None
    focus: float | None
    factor: str
    on_factor: float | None
    dead: bool
