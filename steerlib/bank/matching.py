"""Whether a bank fits a model: by architecture and weights, or site by site."""

from typing import Any, Literal

from ..errors import UnknownSite, WrongModel
from ..hosts import Host, digest_of

Match = Literal["model", "sites"]
"""What has to agree: the whole architecture, or the names and widths of sites."""
BESIDE = ("vocab_size",)
"""What of a fingerprint may differ without a site being another one."""


class Fit(dict[str, str]):
    """How each site fits, by its name: `same weights`, `other weights` (of one architecture), `same shapes` (of weights that
    cannot be told apart), `same width` (in another architecture), `unknown width`, `other width` or `missing`."""

    def __repr__(self) -> str:
        return "\n".join(f"{site:<40} {how}" for site, how in self.items())


MISFITS = ("other width", "missing")


def fit(bank: Any, host: Host) -> Fit:
    """How the sites of a bank fit a model."""
    base, found = bank.base, host.fingerprint()
    alike = all(found.get(key) == value for key, value in base.fingerprint.items() if key not in BESIDE)
    digest = digest_of(host)
    plain = "same shapes" if None in (digest, base.weights) else "same weights" if digest == base.weights else "other weights"
    said = Fit()
    for name, facts in bank.sites.items():
        try:
            width = host.width(host.site(name))
        except UnknownSite:
            said[name] = "missing"
            continue
        how = "unknown width" if width is None else "same width"
        said[name] = "other width" if width not in (None, facts.width) else plain if alike else how
    return said


def check(bank: Any, host: Host, match: Match) -> str:
    """What to say of a model that a bank was not measured on, "" of its own. Raises `WrongModel` where it cannot serve."""
    base, found = bank.base, host.fingerprint()
    maker = base.id or "a model"
    others = [key for key, value in base.fingerprint.items() if found.get(key) != value]
    hard = [key for key in others if key not in BESIDE]
    if hard and match == "model":
        raise WrongModel(
            f"bank {bank.name!r} was made for {maker} with {hard[0]}={base.fingerprint[hard[0]]!r}, this model has "
            f"{found.get(hard[0])!r}; load {base.id or 'that model'}, or train a bank for this one; where sites agree by name "
            "and width, as bank.fits(model) lists, match='sites' uses it all the same"
        )
    if others:
        said = f"{others[0]}={base.fingerprint[others[0]]!r}, this model has {found.get(others[0])!r}"
        misfits = [] if match == "model" else [f"{site} ({how})" for site, how in fit(bank, host).items() if how in MISFITS]
        if misfits and len(misfits) == len(bank.sites):
            raise WrongModel(f"no site of bank {bank.name!r}, made for {maker}, fits this model: {', '.join(misfits[:3])}")
        less = f"; not there: {', '.join(misfits[:3])}{', …' if len(misfits) > 3 else ''}" if misfits else ""
        return f"bank {bank.name!r} was made for {maker} with {said}: its sites fit, effects may differ{less}"
    measured = {concept.name for concept in bank.concepts.values() if concept.effects or concept.range}
    if "adapted" in bank.provenance and measured - {*bank.provenance.get("calibrated", ())}:
        return (
            f"bank {bank.name!r} was measured on another model and adapted to this one: effects may differ until sl.calibrate"
        )
    if base.weights is None or not measured or digest_of(host) in (None, base.weights):
        return ""
    return (
        f"bank {bank.name!r} was measured on other weights of {base.id or 'this architecture'}; "
        "effects may differ on a fine-tuned or differently quantised copy"
    )
