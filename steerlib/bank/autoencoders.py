"""The latents of an autoencoder as concepts: where they enter the decoder, which of them say anything, and what they mean.

A latent is *passive* where its encoder says nothing of the input by it (selective posterior collapse; "Be More Active!"):
hardly any of the variance of `z ~ q(z | x)` over inputs is that of its mean, or its mean hardly varies beside the most active
one's.

`B` inputs, `N` positions of a latent map (1 for a vector), `n` latents, `...` axes of a picture
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..encoders import Codebook, Directions, Encoder
from ..errors import BadBank, UnsupportedTarget
from ..hosts import host_for
from .concepts import Concept
from .portable import Portable
from .vectors import placed_in

ENTRANCES = ("quantize", "post_quant_conv", "decoder")
"""Modules that latents go into, the first that an autoencoder has."""
PICTURES, PLACES = 64, 8
"""Latents drawn from the prior where there is no data, and how high and wide their maps are at most."""
SAID, CLEAR = 2, 0.5
"""Facts that a label tells at most, and by how many standard deviations over pictures they have to change."""
VALUES = 20
"""Different values from which on a factor is cut into as many parts of equal size."""


Made = TypeVar("Made")
Read = Callable[[Tensor], Any] | None


class Posterior(NamedTuple):
    """What an encoder says of inputs: means and variances of latents `[B, n, ...]`."""

    mean: Tensor
    variance: Tensor


class Latents(NamedTuple):
    """What is known of latents: their encoder and its id, those that are active as concepts, and the others' names."""

    id: str
    site: str
    encoder: Encoder
    concepts: list[Concept]
    passive: list[str]


class Derived(Portable):
    """What makes a bank of a model's own parts; `ConceptBank` sets the attributes."""

    @classmethod
    def from_autoencoder(
        cls: type[Made], base: object, data: Tensor | None = None, *, factors: Mapping[str, Sequence[Any]] | None = None,
        encode: Read = None, decode: Read = None, site: str | None = None, name: str = "latents", least: float = 0.01,
        seed: int = 0,
    ) -> Made:  # fmt: skip
        """A bank of an autoencoder's active latents, `z0`, `z1`, …: a channel of the latent map, or a number of the vector.

        Of a quantiser also the codes in use, `code 0`, `code 1`, …, which `sl.Swap` puts in each other's place. One unit is the
        standard deviation over data. Labels tell what changes from one end of a latent to the other, and which known factor
        explains it. Passive latents and unused codes are listed in `provenance["passive"]`.

        Args:
            base: an autoencoder, or a pipeline with one, in which the bank then steers.
            data: inputs of the encoder, `[B, ...]`; None: pictures that it makes of draws from the prior.
            factors: by name, what is known of each input.
            encode, decode: in place of its own, for a module that calls them otherwise or gives tuples.
            site: where latents enter the decoder, if no module called `quantize`, `post_quant_conv` or `decoder` shows it.
            name: name of the bank.
            least: latents with a smaller share of variance that tells of the input, or beside the most active one, are passive.
            seed: of the draws.

        >>> vae = torch.nn.Module()
        >>> vae.encode, vae.decoder = torch.nn.Linear(6, 2), torch.nn.Linear(2, 6)
        >>> vae.decode = vae.decoder
        >>> sl.ConceptBank.from_autoencoder(vae, torch.randn(9, 6)).keys()
        dict_keys(['z0', 'z1'])
        """
        make, given = cast(Any, cls), factors or {}
        return make(name, **parts(base, data, encode, decode, site=site, factors=given, least=least, seed=seed))


@torch.no_grad()
def parts(
    base: Any,
    data: Tensor | None,
    encode: Read,
    decode: Read,
    *,
    site: str | None,
    factors: Mapping[str, Sequence[Any]],
    least: float,
    seed: int,
) -> dict[str, Any]:
    """Arguments of `ConceptBank` for an autoencoder."""
    inside, prefix = autoencoder_of(base)
    draw: Callable[[Tensor], Any] = decode or inside.decode
    inputs = decoded(draw(prior(inside, seed))) if data is None else data
    for factor, values in factors.items():
        if len(values) != len(inputs):
            raise BadBank(f"expected a value of {factor!r} for each of {len(inputs)} inputs, got {len(values)}")
    told = posterior((encode or inside.encode)(inputs))
    found = [latents(told, draw, site or entrance(inside, prefix), factors, least), *codes(inside, prefix, told)]
    said = {
        "passive": [name for part in found for name in part.passive],
        "data": "drawn from the prior" if data is None else "given",
    }
    return {
        **placed_in({part.site: part.encoder for part in found}, {}, base, None),
        "where": {part.id: part.site for part in found},
        "concepts": [concept for part in found for concept in part.concepts],
        "encoders": {part.id: part.encoder for part in found},
        "provenance": said,
    }


def autoencoder_of(target: Any) -> tuple[Any, str]:
    """The autoencoder in a pipeline, or itself, and how paths to it begin. Raises `UnsupportedTarget` where there is none."""
    inside = target if isinstance(target, nn.Module) else getattr(target, "vae", getattr(target, "vqvae", None))
    if not isinstance(inside, nn.Module):
        raise UnsupportedTarget(
            f"expected an autoencoder, or a pipeline with one called vae, got {type(target).__name__}; give the autoencoder"
        )
    prefix = next((f"{name}." for name, part in host_for(target).model.named_children() if part is inside), "")
    return inside, "" if inside is target else prefix


def entrance(autoencoder: nn.Module, prefix: str = "", names: Sequence[str] = ENTRANCES) -> str:
    """Name of the site at which latents enter; raises `UnsupportedTarget` where no module shows it."""
    for name in names:
        if isinstance(getattr(autoencoder, name, None), nn.Module):
            return f"{prefix}{name}.in" + ("" if prefix else ":BDN")
    raise UnsupportedTarget(
        f"found no module of {type(autoencoder).__name__} that latents enter ({', '.join(names)}); name the one in which "
        "decoding begins, as in site='net.up.in:BDN'"
    )


def posterior(found: Any) -> Posterior:
    """What an encoder gave, whatever it calls it. Raises `UnsupportedTarget` for a tuple, which may mean anything."""
    if (dist := getattr(found, "latent_dist", None)) is not None:
        return Posterior(dist.mode(), torch.as_tensor(dist.var).expand_as(dist.mode()))
    if hasattr(found, "variance"):
        return Posterior(found.mean, found.variance)
    mean = getattr(found, "latents", getattr(found, "latent", found))
    if not isinstance(mean, Tensor):
        raise UnsupportedTarget(
            f"expected encode(x) to give latents as a tensor, or a distribution, got {type(found).__name__}; give encode= a "
            "function that does, such as lambda x: vae.encode(x)[0]"
        )
    return Posterior(mean, torch.zeros_like(mean))


def decoded(found: Any) -> Tensor:
    """What a decoder gave, `[B, ...]`."""
    return getattr(found, "sample", found)


def latents(
    found: Posterior,
    draw: Callable[[Tensor], Any],
    site: str,
    factors: Mapping[str, Sequence[Any]],
    least: float,
) -> Latents:
    """The latents of an autoencoder, from what its encoder says of inputs and from what its decoder draws."""
    flat, variance = (part.float().cpu().flatten(2) if part.ndim > 2 else part.float().cpu()[..., None] for part in found)
    mean, spread = flat.mean((0, 2)), flat.transpose(0, 1).flatten(1).var(-1)
    noise = variance.mean((0, 2))
    active = (spread >= least * (spread + noise)) & (spread >= least * spread.max()) & (spread > 0)
    labels = described(found.mean, draw, active)
    known = {k: on_factors(flat[:, k].mean(-1), factors) for k in active.nonzero()[:, 0].tolist()}
    rest = (flat - mean[:, None]).transpose(0, 1).flatten(1)
    concepts = [
        Concept(
            name=f"z{k}",
            encoder=site,
            index=k,
            unit=float(spread[k].sqrt()),
            natural=tuple(torch.quantile(_few(rest[k]), torch.tensor([0.005, 0.995])).tolist()),  # type: ignore[arg-type]
            label="; ".join(filter(None, (own, labels[k]))),
            source="known factors, extreme values" if own else "extreme values",
        )
        for k, own in known.items()
    ]
    passive = [f"z{k}" for k in (~active).nonzero()[:, 0].tolist()]
    return Latents(site, site, Directions(torch.eye(len(mean)), mean), concepts, passive)


def codes(autoencoder: Any, prefix: str, found: Posterior) -> list[Latents]:
    """The codes of a quantiser that has a table of them, where they leave it; no part where there is none."""
    table = getattr(getattr(getattr(autoencoder, "quantize", None), "embedding", None), "weight", None)
    if not isinstance(table, Tensor):
        return []
    book = Codebook(table.detach().float().cpu())
    shares = book.encode(found.mean.float().cpu().flatten(2).transpose(1, 2)).mean((0, 1)).tolist()
    if getattr(getattr(autoencoder, "config", None), "norm_type", "") == "spatial":  # its decoder is given them twice
        site = f"{prefix}quantize:0"
    else:
        site = entrance(autoencoder, prefix, ENTRANCES[1:])
    id = f"{site}#{Codebook.kind}"
    concepts = [
        Concept(name=f"code {k}", encoder=id, index=k, label=f"{share:.1%} of positions", source="counted")
        for k, share in enumerate(shares)
        if share > 0
    ]
    return [Latents(id, site, book, concepts, [f"code {k}" for k, share in enumerate(shares) if not share])]


def prior(autoencoder: Any, seed: int) -> Tensor:
    """Draws from the prior, in the scale of latents; raises `BadBank` where the model does not say how many latents it has."""
    config = getattr(autoencoder, "config", {})
    if not (count := getattr(config, "latent_channels", None)):
        raise BadBank(f"{type(autoencoder).__name__} does not say how many latents it has; give data=, inputs of its encoder")
    kept = getattr(autoencoder, "dtype", torch.float32)
    noise = torch.randn(PICTURES, count, PLACES, PLACES, generator=torch.Generator().manual_seed(seed))
    scaled = noise / (getattr(config, "scaling_factor", None) or 1.0) + (getattr(config, "shift_factor", None) or 0.0)
    return scaled.to(next(iter(autoencoder.parameters())).device, kept)


def _few(values: Tensor, most: int = 1 << 20) -> Tensor:
    """Evenly spaced values, as many as quantiles are taken of."""
    return values[:: -(-len(values) // most)]


# -- labels ----------------------------------------------------------------------------------------------------------


def on_factors(z: Float[Tensor, " B"], factors: Mapping[str, Sequence[Any]]) -> str:
    """The factor that explains most of a latent's variance, as a label; nothing where none explains a tenth of it."""
    shares = {name: explained(z, values) for name, values in factors.items()}
    best = max(shares, key=shares.__getitem__, default="")
    return f"{best} ({shares[best]:.0%} of its variance)" if best and shares[best] >= 0.1 else ""


def explained(z: Float[Tensor, " B"], values: Sequence[Any]) -> float:
    """Share of a latent's variance between the values of a factor, less what as many random groups would have (epsilon
    squared, Kelley 1935)."""
    _, group = torch.unique(torch.as_tensor(values), return_inverse=True)
    count = int(group.max()) + 1
    if count > VALUES:
        group, count = torch.as_tensor(values).double().argsort().argsort() * VALUES // len(z), VALUES
    z = z.double()
    total = float((z - z.mean()).square().sum())
    sizes = torch.bincount(group, minlength=count)
    means = torch.zeros(count, dtype=z.dtype).index_add(0, group, z) / sizes.clamp(min=1)
    within = float((z - means[group]).square().sum())
    if not total or len(z) <= count:
        return 0.0
    return max(0.0, 1 - (within / (len(z) - count)) / (total / (len(z) - 1)))


def described(z: Tensor, decode: Callable[[Tensor], Any], active: Tensor) -> list[str]:
    """What changes in pictures as each active latent goes from one end of its values to the other, the rest as it is."""
    few = z[:16]
    spread = facts(decoded(decode(few)))
    labels = [""] * len(active)
    for k in active.nonzero()[:, 0].tolist():
        ends = []
        for end in (0.005, 0.995):
            moved = few.clone()
            moved[:, k] = torch.quantile(_few(z[:, k].float().flatten()), end).to(z.dtype)
            ends.append(facts(decoded(decode(moved))))
        labels[k] = in_words(ends[0], ends[1], spread)
    return labels


def in_words(low: Mapping[str, Tensor], high: Mapping[str, Tensor], spread: Mapping[str, Tensor]) -> str:
    """The facts that change most between both ends, in words; their standard deviation over pictures is the scale."""
    changes = {words: float((high[words] - low[words]).mean() / spread[words].std().clamp(min=1e-3)) for words in spread}
    clear = sorted((words for words in changes if abs(changes[words]) >= CLEAR), key=lambda words: -abs(changes[words]))
    told = [words.split(" / ")[int(changes[words] < 0)] for words in clear[:SAID]]
    return f"up: {', '.join(told)}" if told else ""


def facts(pictures: Tensor) -> dict[str, Float[Tensor, " B"]]:
    """What can be said of pictures `[B, channels, H, W]` in words, by what more of it and less of it is called; of what else
    is decoded, nothing."""
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        return {}
    x = pictures.float().cpu()
    middle = x.flatten(2).median(-1).values[..., None, None]
    apart = (x - middle).abs().mean(1)
    mass = apart.flatten(1).sum(-1).clamp(min=1e-6)
    down, across = (torch.linspace(-1, 1, size) for size in x.shape[2:])
    found = {
        "brighter / darker": x.mean((1, 2, 3)),
        "more contrast / less contrast": x.flatten(1).std(-1),
        "further right / further left": (apart.sum(1) * across).sum(-1) / mass,
        "further down / further up": (apart.sum(2) * down).sum(-1) / mass,
        "larger / smaller": (apart > apart.flatten(1).amax(-1)[:, None, None] / 2).float().mean((1, 2)),
    }
    if x.shape[1] == 3:
        for k, colour in enumerate(("red", "green", "blue")):
            found[f"more {colour} / less {colour}"] = x[:, k].mean((1, 2)) - x.mean((1, 2, 3))
    return found
