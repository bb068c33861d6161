"""One encoder while it is trained: its weights, Adam's state, and which latents are dead."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ...encoders import KINDS, Sparse, Transcoder
from ...encoders.objective import Weights
from ...errors import BadRecipe
from .dense_step import dense_step
from .encoder_recipe import EncoderRecipe, transcoding
from .inputs import Affine, geometric_median, normalising, times
from .sparse_step import Gather, Outcome, sparse_step

REFRESH = 50
"""Steps between looks at which latents are dead, for which the CPU has to wait for the accelerator."""
MEMORY = 100
"""Batches over which the threshold of BatchTopK is averaged."""


class Learner:
    """Everything its next step depends on is in `tensors`."""

    def __init__(
        self,
        recipe: EncoderRecipe,
        x: Float[Tensor, "tokens D"],
        y: Float[Tensor, "tokens D2"] | None,
        steps: int,
        gather: Gather | None = None,
    ):
        """`x`, and for a transcoder `y`, are a sample from which scale, variance and the decoder bias are taken."""
        if y is not None and not recipe.objective.transcodes:
            raise BadRecipe(f"expected a kind that can be a transcoder ({transcoding()}), got {recipe.kind!r}")
        if y is None and recipe.skip:
            raise BadRecipe("expected skip for a transcoder only; name the site that it reads, or leave it out")
        self.recipe, self.steps, self.transcodes, self.gather = recipe, steps, y is not None, gather
        self.reads = normalising(recipe.normalise, x)
        self.writes = self.reads if y is None else normalising(recipe.normalise, y)
        x, y = self.normal(x, y)
        target = x if y is None else y
        self.variance = float((target - target.mean(0)).square().sum(-1).mean())
        """V: of a token, all channels together."""
        self.scale = float(x.square().mean().sqrt())
        """Root mean square of what is read."""
        self.weights = {name: torch.nn.Parameter(t) for name, t in begun(recipe, x, y, self.scale).items()}
        self.since = torch.zeros(recipe.latents, dtype=torch.int64, device=x.device)
        """Tokens since each latent fired."""
        self.dead = self.since[:0]
        self.threshold = torch.zeros((), device=x.device)
        self.adam = torch.optim.Adam(self.weights.values(), eps=6.25e-10, fused=True)

    def normal(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Activations as the weights see them."""
        x = x.float() if self.reads is None else self.reads(x.float())
        if y is not None:
            y = y.float() if self.writes is None else self.writes(y.float())
        return x, y

    @torch.no_grad()
    def outcome(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"] | None, step: int) -> Outcome:
        """Loss and gradients of a batch, or of a process's part of one, at this step."""
        recipe = self.recipe
        x, y = self.normal(x, y)
        weights: Weights = {name: parameter.detach() for name, parameter in self.weights.items()}
        unit = recipe.batch * self.variance
        if recipe.objective.loss is None:
            dead = self.dead if recipe.auxk and len(self.dead) else None
            return sparse_step(recipe, weights, x, y, unit=unit, dead=dead, gather=self.gather)
        price = recipe.price_at(step, self.steps)
        return dense_step(recipe, weights, x, y, unit=unit, tokens=recipe.batch, price=price, scale=self.scale)

    @torch.no_grad()
    def learn(self, outcome: Outcome, step: int) -> None:
        """Move by what all processes found."""
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate_at(step, self.steps)
        for name, parameter in self.weights.items():
            parameter.grad = outcome.gradients[name]
        self.adam.step()
        self.adam.zero_grad()
        if self.recipe.objective.unit_rows:
            normalize(self.weights["decoder"], dim=-1, out=self.weights["decoder"])
        self.since.add_(self.recipe.batch).masked_fill_(outcome.fired > 0, 0)
        self.threshold.lerp_(outcome.least, max(1 / MEMORY, 1 / (step + 1)))
        if step % REFRESH == REFRESH - 1:
            self.dead = (self.since >= self.recipe.dead_after).nonzero()[:, 0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        found = {"since": self.since, "dead": self.dead, "threshold": self.threshold}
        found["facts"] = torch.tensor([self.variance, self.scale], dtype=torch.float64)
        for side in ("reads", "writes"):
            affine = getattr(self, side)
            found |= {f"{side}.{name}": tensor for name, tensor in affine._asdict().items()} if affine else {}
        for name, parameter in self.weights.items():
            found[name] = parameter.detach()
            found |= {f"{name}.{key}": tensor for key, tensor in self.adam.state[parameter].items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        device = self.since.device
        self.since, self.dead, self.threshold = (tensors[name].to(device) for name in ("since", "dead", "threshold"))
        self.variance, self.scale = tensors["facts"].tolist()
        for side in ("reads", "writes"):
            if f"{side}.mean" in tensors:
                setattr(self, side, Affine(*(tensors[f"{side}.{name}"].to(device) for name in Affine._fields)))
        for name, parameter in self.weights.items():
            parameter.data.copy_(tensors[name])
            keys = [key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")]
            self.adam.state[parameter] = {key: tensors[f"{name}.{key}"].to(device) for key in keys}

    @torch.no_grad()
    def encoder(self) -> Sparse:
        """The encoder as far as it is trained, reading activations as they come.

        Where latents do not compete each is rescaled until its decoder row has unit length; otherwise all are, by one factor.
        """
        objective = self.recipe.objective
        w = objective.finish({name: parameter.detach().clone() for name, parameter in self.weights.items()})
        if self.reads is not None and self.writes is not None:
            w["encoder"], w["decoder"] = times(w["encoder"], self.reads.forth), times(w["decoder"], self.writes.back)
            w["decoder_bias"] = self.writes.mean + times(w["decoder_bias"][None], self.writes.back)[0]
            if "skip" in w:
                w["skip"] = times(times(w["skip"], self.reads.forth).T, self.writes.back).T
                w["decoder_bias"] = w["decoder_bias"] - w["skip"] @ self.reads.mean
        if self.transcodes and self.reads is not None:
            w["bias"] = w["bias"] - w["encoder"] @ self.reads.mean
        length = w["decoder"].norm(dim=-1)
        if objective.keeps is not None:
            length = length.mean().expand_as(length)
        w["encoder"], w["decoder"] = w["encoder"] * length[:, None], w["decoder"] / length[:, None]
        for name in objective.potentials:
            w[name] = w[name] * length
        return self._made({name: t.cpu().contiguous() for name, t in w.items()}, float(self.threshold * length[0]))

    def _made(self, tensors: Weights, threshold: float) -> Sparse:
        recipe, objective = self.recipe, self.recipe.objective
        known = {"k": recipe.k, "groups": recipe.sizes, "threshold": threshold}
        settings = {name: known[name] for name in objective.settings} | ({} if self.transcodes else {"centred": True})
        skip = tensors.pop("skip", None)
        made = KINDS[recipe.kind].from_tensors(tensors, settings)
        assert isinstance(made, Sparse)
        if not self.transcodes:
            return made
        own: dict[str, Any] = {name: tensors[name] for name in (*Sparse.tensors, *Sparse.shared)}
        k = recipe.k if objective.keeps == "token" else None
        return Transcoder(**own, threshold=made.thresholds(), skip=skip, k=k)


@torch.no_grad()
def begun(recipe: EncoderRecipe, x: Float[Tensor, "tokens D"], y: Float[Tensor, "tokens D2"] | None, scale: float) -> Weights:
    """First weights: unit directions that read what they write, around the geometric median (Gao et al. 2024)."""
    generator, n = torch.Generator().manual_seed(recipe.seed), recipe.latents
    target = x if y is None else y
    decoder = normalize(torch.randn(n, target.shape[-1], generator=generator), dim=-1).to(x)
    encoder = decoder.clone() if y is None else normalize(torch.randn(n, x.shape[-1], generator=generator), dim=-1).to(x)
    bias = torch.zeros(n).to(x) if y is None else -encoder @ geometric_median(x)
    weights = {"encoder": encoder, "bias": bias, "decoder": decoder, "decoder_bias": geometric_median(target)}
    if recipe.skip:
        weights["skip"] = torch.zeros(target.shape[-1], x.shape[-1]).to(x)
    return weights | recipe.objective.begin(torch.zeros_like(bias), scale)
