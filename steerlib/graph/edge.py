"""An edge of a causal graph, and what is known of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import BadBank, CorruptBank

Relation = Literal["compute", "selection", "context", "total"]
Evidence = Literal["observed", "randomised", "verified", "asserted"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
"""As files number them, like the next: what is added comes last."""
EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)
ANSWERS = "answers:"
"""What the name of an outcome begins with: how much answers show something, which can be moved and not be edited."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One concept's effect on another, measured by intervention. Figures are in units of the two concepts.

    Args:
        src: name of the cause.
        dst: name of the effect: a concept; or an outcome, such as `answers:nature`, how much answers show of `nature`.
        weight: change of `dst` per unit of `src`, with no other concept between them; of a total effect, what edges along the
            way multiply to; of a part, what it adds to the log-likelihood of the whole, nats a unit.
        relation: `compute`: moving the one moves the other, along the order of generation. `selection`: the one is a part of
            the other in the data, against that order; steering follows no such edge. `context`: a total effect that a
            context module learned, over all paths; `sl.Do` has the module itself compute it. `total`: what `src` does to a
            concept two levels on or more, over all paths, those included that the graph does not know.
        evidence: `asserted`: stated by hand; `observed` in readings; `randomised`: found by ablating many at random;
            `verified`: by ablating the source alone, `n_verify` times, with `tau` as the result.
        tau: `E[z_dst - z_dst | do(z_src = 0)] / E[z_src]` on contexts that nothing was fitted to.
        tau_lo: lower end of its 95 % interval, by bootstrap over contexts; of a context module, the least over seeds.
        tau_hi: upper end, or the largest.
        necessity: `1 - E[z_dst | do(z_src = 0)] / E[z_dst]` where both fire.
        sufficiency: `E[z_dst | do(z_src = q90)] / q90_dst` where the source does not fire.
        n_verify: number of contexts in which the source was ablated alone.
        p_adj: p value of `tau` being 0, adjusted for all edges that were tested (Benjamini & Hochberg 1995).
        same: share of the effect at the token that the source is ablated at; the rest comes to later tokens.
        everywhere: whether it is there in every one of several environments, with effects that do not differ; False where they
            differ.

    Raises:
        BadBank: it says that it is verified, and lacks `tau` or `n_verify`.

    >>> sl.Edge(src="a", dst="b", weight=0.5, tau=0.4, evidence="verified", n_verify=20).effect
    0.4
    """

    src: str
    dst: str
    weight: float
    relation: Relation = "compute"
    evidence: Evidence = "asserted"
    tau: float | None = None
    tau_lo: float | None = None
    tau_hi: float | None = None
    necessity: float | None = None
    sufficiency: float | None = None
    n_verify: int = 0
    p_adj: float | None = None
    same: float | None = None
    everywhere: bool | None = None

    def __post_init__(self) -> None:
        if self.evidence == "verified" and (self.tau is None or self.n_verify < 1):
            raise BadBank(
                f"edge {self.src!r} -> {self.dst!r}: a verified edge needs tau and n_verify, what ablating {self.src!r} alone "
                f"showed and how often, got {self.tau} and {self.n_verify}; leave evidence out for one that is stated by hand"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without what is not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> "Edge":
        """From JSON of a stranger: unknown fields are ignored; raises `CorruptBank` on values that an edge cannot have."""
        given = {f.name: values[f.name] for f in fields(cls) if f.name in values} if isinstance(values, Mapping) else {}
        if not {"src", "dst", "weight"} <= given.keys() or not all(_is_sound(*item) for item in given.items()):
            raise CorruptBank(f"expected an edge with src, dst, weight and finite figures, got {values!r:.200}")
        try:
            return cls(**given)
        except BadBank as error:
            raise CorruptBank(str(error)) from None

    @property
    def is_outcome(self) -> bool:
        """Whether its effect is on answers, not on a concept."""
        return self.dst.startswith(ANSWERS)

    @property
    def effect(self) -> float:
        """What forecasts go by: `tau` where the edge is verified, else `weight`."""
        return self.weight if self.tau is None or self.evidence != "verified" else self.tau


WORDS: dict[str, tuple[str, ...] | None] = {"src": None, "dst": None, "relation": RELATIONS, "evidence": EVIDENCE}
"""Fields that are texts, and what they can be, if not anything."""
HUGE = 1e300


def _is_sound(key: str, value: Any) -> bool:
    """Whether a stranger's value can be that of a field."""
    if key in WORDS:
        return isinstance(value, str) and (WORDS[key] is None or value in (WORDS[key] or ()))
    if isinstance(value, bool) or key == "everywhere":
        return isinstance(value, bool) and key == "everywhere"
    return isinstance(value, int if key == "n_verify" else int | float) and -HUGE < value < HUGE
