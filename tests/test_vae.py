"""The study of autoencoders: what is drawn, what is trained for, what the tables say, and the whole in small."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from vae import findings, run
from vae.__main__ import runs, tables
from vae.models import CODES, Quantised
from vae.objectives import BETA_TC, Discriminator, Draw, divergence, moments, objective, quantised, total_correlation
from vae.run import QUICK, pictures, unexplained
from vae.tracing import ball, box, capsule, cone, cylinder, lit, rays, ring, trace
from vae.worlds import WORLDS

# -- pictures --------------------------------------------------------------------------------------------------------


def drawn(world, side=32, /, **values):
    """Pictures of the middle values of every factor but those given."""
    factors = WORLDS[world].factors
    count = max(len(v) for v in values.values())
    middle = {name: torch.full((count,), n // 2) for name, n in factors.items()}
    return WORLDS[world].pictures({**middle, **{name: torch.tensor(v) for name, v in values.items()}}, side)


@pytest.mark.parametrize("world", WORLDS)
def test_every_factor_shows_and_a_picture_is_the_same_in_any_company(world):
    factors = WORLDS[world].factors
    for name, n in factors.items():
        x = drawn(world, **{name: list(range(n))})
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        apart = (x[:, None] - x[None]).abs().amax((2, 3, 4)) + torch.eye(n)
        if (world, name) != ("sprites", "angle"):  # half a turn of an ellipse
            assert float(apart.min()) > 0.02, name
    values = WORLDS[world].values(5, 3)
    whole = WORLDS[world].pictures(values, 16)
    alone = torch.cat([WORLDS[world].pictures({name: v[[k]] for name, v in values.items()}, 16) for k in range(5)])
    torch.testing.assert_close(whole, alone)
    assert whole.shape == (5, 1 if world in ("sprites", "solids") else 3, 16, 16)


@pytest.mark.parametrize("world", WORLDS)
def test_a_larger_picture_is_the_same_one_in_more_pixels(world):
    """Of 64 pixels, the mean of every four is about the picture of 32; of other values it is not."""
    values = WORLDS[world].values(6, 3)
    large, small = (WORLDS[world].pictures(values, side) for side in (64, 32))
    assert large.shape[2:] == (64, 64)
    apart = (torch.nn.functional.avg_pool2d(large, 2)[:, None] - small[None]).abs().mean((2, 3, 4))
    assert float(apart.diagonal().max()) < 0.02 and float((apart + torch.eye(6)).min()) > 2 * float(apart.diagonal().max())


def test_values_are_drawn_evenly_and_apart():
    values = WORLDS["sprites"].values(6000, 0)
    assert np.bincount(values["shape"]).tolist() == pytest.approx([2000] * 3, abs=150)
    assert abs(np.corrcoef(values["x"], values["y"])[0, 1]) < 0.05


def test_a_sprite_is_where_and_as_large_as_its_factors_say():
    x = drawn("sprites", 64, x=[0, 7], shape=[0, 0], angle=[0, 0])[:, 0]
    at = (x.sum(1) * torch.arange(64)).sum(-1) / x.sum((1, 2))
    assert float(at[1] - at[0]) == pytest.approx(1.1 * 32, abs=0.05)
    areas = drawn("sprites", 64, scale=[0, 3], shape=[0, 0], angle=[0, 0]).sum((1, 2, 3))
    sides = torch.tensor([0.25, 0.45]) * 0.75 * 64
    torch.testing.assert_close(areas, sides**2, rtol=0.02, atol=0)
    half = drawn("sprites", angle=[1, 5])
    torch.testing.assert_close(half[0], half[1], atol=1e-4, rtol=0)


def test_mirrored_values_draw_mirrored_pictures():
    disc = drawn("arm", **{"first joint": [1, 6], "second joint": [5, 2], "shape": [0, 0]})
    torch.testing.assert_close(disc[0], disc[1].flip(-1), atol=1e-4, rtol=0)
    face = drawn("faces", turn=[0, 4])
    torch.testing.assert_close(face[0], face[1].flip(-1), atol=1e-4, rtol=0)
    view = drawn("room", angle=[1, 5], shape=[2, 2])
    brightest = view.amax(1)  # side walls and light differ in brightness, places do not
    assert float(((brightest[0] - brightest[1].flip(-1)).abs() > 0.5).float().mean()) < 0.02


def test_floor_and_wall_are_different_pixels():
    floor, wall = (drawn("room", **{name: [0, 3]}) for name in ("floor hue", "wall hue"))
    changed = [(x[0] - x[1]).abs().amax(0) > 1e-6 for x in (floor, wall)]
    assert not (changed[0] & changed[1]).any() and changed[0].float().mean() > 0.2 and changed[1].float().mean() > 0.2


@pytest.mark.parametrize("shape", [ball, box, cylinder, capsule, cone, ring])
def test_distances_are_never_too_long_and_vanish_on_the_surface(shape):
    """A distance has slope 1 at most (else tracing would jump through), and a point moved by it along it is on the surface."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(1, 4000, 3, generator=g), torch.randn(1, 4000, 3, generator=g)
    assert float(((shape(p) - shape(q)).abs() / (p - q).norm(dim=-1)).max()) <= 1 + 1e-5
    start, looks = rays(32, torch.zeros(1), torch.full((1,), 0.4), 4.5)
    seen = trace(shape, start, looks, 32)
    hit = seen.cover == 1
    assert 20 < int(hit.sum()) < 900 and float(shape(seen.point)[hit].abs().median()) < 0.01


def test_a_ball_is_lit_by_the_angle_of_its_surface():
    start, looks = rays(32, torch.zeros(1), torch.full((1,), 0.4), 4.5)
    assert float(start.norm()) == pytest.approx(4.5) and float(start[0, 0, 1]) == pytest.approx(4.5 * math.sin(0.4), rel=1e-5)
    seen = trace(ball, start, looks, 32)
    hit = seen.cover == 1
    torch.testing.assert_close(
        seen.normal[hit], seen.point[hit] / seen.point[hit].norm(dim=-1, keepdim=True), atol=0.02, rtol=0
    )
    radius = 16 / math.sqrt(4.5**2 - 1) / 0.45  # in pixels, of the cone that touches the ball; edges are soft outwards
    assert math.pi * radius**2 < float(seen.cover.sum()) < math.pi * (radius + 0.8) ** 2
    light = torch.tensor([[[0.0, 2.0, 0.0]]])
    assert lit(torch.tensor([[[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]), light)[0].tolist() == pytest.approx(
        [1, 0.3, 0.3]
    )


# -- objectives --------------------------------------------------------------------------------------------------------


def latents(m=6, n=3):
    g = torch.Generator().manual_seed(0)
    q = Normal(torch.randn(m, n, generator=g), 0.2 + torch.rand(m, n, generator=g))
    return Draw(q.mean + q.stddev * torch.randn(m, n, generator=g), q)


def test_divergence_is_that_of_normal_distributions():
    q = latents().q
    by_hand = (q.mean**2 + q.variance - 1 - q.variance.log()).sum() / 2 / 6
    assert float(divergence(q)) == pytest.approx(float(by_hand), rel=1e-5)


def test_total_correlation_is_that_of_the_formula():
    d, n = latents(), 50
    found = []
    for z in d.z:
        logs = np.array([[float(Normal(d.q.mean[j, i], d.q.stddev[j, i]).log_prob(z[i])) for i in range(3)] for j in range(6)])
        found.append(np.log(np.exp(logs.sum(1)).sum() / (6 * n)) - np.log(np.exp(logs).sum(0) / (6 * n)).sum())
    assert float(total_correlation(d, n)) == pytest.approx(np.mean(found), rel=1e-5)
    same = Draw(d.z, Normal(torch.zeros(6, 3), torch.ones(6, 3)))
    assert float(total_correlation(same, n)) == pytest.approx(2 * math.log(n), rel=1e-5)  # (n - 1) log N, its known bias


def test_penalties_are_those_of_disent():
    """`_betatc_compute_total_correlation` of `disent` 0.8.0, which leaves out the number of pictures, a constant; and `DipVae`
    of kind i, which leaves variances out. Its kind ii adds their mean to every entry of the covariance, the paper to its
    diagonal: that one is compared by hand below."""
    d = latents()
    assert float(total_correlation(d, 50)) - 2 * math.log(6 * 50) == pytest.approx(-3.3714199, abs=1e-5)
    assert float(moments(Normal(d.q.mean, torch.full_like(d.q.mean, 1e-6)))) == pytest.approx(7.0813713, abs=1e-4)


def test_moments_are_of_the_mixture():
    """By hand: means (1, 1) and (-1, -1) with variance 0.5 have covariance 1 and variances 1.5."""
    q = Normal(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.full((2, 2), 0.5**0.5))
    assert float(moments(q)) == pytest.approx(10 * 2 * 0.25 + 10 * 2 * 1.0, rel=1e-5)


def test_a_discriminator_finds_what_latents_share():
    torch.manual_seed(0)
    both, apart = (Discriminator(2, width=32) for _ in range(2))
    for one in (both, apart):
        one.adam.param_groups[0]["lr"] = 1e-2
    q = Normal(torch.zeros(1), torch.ones(1))
    for _ in range(150):
        z = torch.randn(64, 1)
        both.learn(torch.cat([z, z], -1))
        apart.learn(torch.randn(64, 2))
    z = torch.randn(256, 1)
    with torch.no_grad():
        told = [
            float((net[:, 0] - net[:, 1]).mean()) for net in (both.net(torch.cat([z, z], -1)), apart.net(torch.randn(256, 2)))
        ]
    assert told[0] > 1 and abs(told[1]) < 0.3
    found = both(Draw(torch.cat([z, z], -1), q))
    assert float(found.detach()) == pytest.approx(10 * told[0], rel=0.2)


def test_each_kind_has_its_own_loss():
    """From the same weights and draws the losses differ by the penalties alone."""
    learned, _ = pictures("sprites", QUICK._replace(pictures=40, told=8))
    x, found = learned.inputs[:16], {}
    for kind in run.KINDS[:5]:
        model = run.made(kind, x, 0, QUICK)
        loss = objective(kind, QUICK.latents, 40)
        torch.manual_seed(5)
        found[kind] = float(loss(model, x, 1.0).detach())
    model = run.made("VAE", x, 0, QUICK)
    torch.manual_seed(5)
    q = model.encode(x)
    d = Draw(q.rsample(), q)
    assert found["beta-VAE"] - found["VAE"] == pytest.approx(3 * float(divergence(q).detach()), abs=1e-3)
    assert found["beta-TC-VAE"] - found["VAE"] == pytest.approx(
        (BETA_TC - 1) * float(total_correlation(d, 40).detach()), abs=1e-2
    )
    assert found["DIP-VAE-II"] - found["VAE"] == pytest.approx(float(moments(q).detach()), abs=1e-2)
    plain = -(x * torch.log(model.decode(d.z)) + (1 - x) * torch.log(1 - model.decode(d.z))).sum() / 16
    assert found["VAE"] == pytest.approx(float((plain + divergence(q)).detach()), rel=1e-5)
    for kind in run.KINDS[:5]:
        loss = objective(kind, QUICK.latents, 40)
        torch.manual_seed(5)
        assert float(loss(model, x, 0.0).detach()) == pytest.approx(float(plain.detach()), rel=1e-5), kind


def test_what_is_asked_of_latents_grows_over_half_of_the_steps():
    asked, model, x = [], torch.nn.Linear(1, 1), torch.zeros(4, 1)
    run.train(model, x, lambda: lambda model, x, weight: (asked.append(weight), model(x).sum())[1], QUICK._replace(steps=8))
    assert asked == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1] and not model.training


def test_a_quantiser_pulls_its_encoder_a_quarter_as_much_as_its_book():
    torch.manual_seed(0)
    model, x = Quantised(1, 4, 4), torch.rand(8, 1, 16, 16)
    model.begin(x)
    found = model.encode(x).permute(0, 2, 3, 1).flatten(0, 2)
    assert (model.quantize.embedding.weight[:, None] == found[None]).all(-1).any(1).sum() == CODES
    torch.nn.init.normal_(model.quantize.embedding.weight)
    z = model.encode(x).detach().requires_grad_()
    e, loss, _ = model.quantize(z)
    loss.backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, 2 * 0.25 * (z - e).detach() / z.numel(), atol=1e-7, rtol=1e-4)
    pulled = model.quantize.embedding.weight.grad
    assert pulled is not None
    torch.testing.assert_close(pulled.sum(0), (2 * (e - z).detach() / z.numel()).sum((0, 2, 3)), atol=1e-6, rtol=1e-4)
    assert float(quantised(model, x).detach()) > float(loss.detach()) > 0
    moved = z.detach() + 1e-4 * torch.randn(z.shape)
    torch.testing.assert_close(model.decode(moved), model.decode(z.detach()))  # small moves change no code


# -- tables ------------------------------------------------------------------------------------------------------------


def cells(values):
    """Two data sets, three kinds."""
    return {(w, k): [{"a": float(v), "b": float(v) ** 2} for v in some] for (w, k), some in values.items()}


def test_a_correlation_is_of_ranks():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=20).tolist(), rng.normal(size=20).tolist()
    assert findings.rank_correlation(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert findings.rank_correlation([1, 1, 1], [1, 2, 3]) is None and findings.rank_correlation([1, 2], [1, 2]) is None


def test_intervals_are_over_seeds_and_there_is_none_for_one():
    one = findings.over_seeds(cells({("s", "A"): [3]}), findings.mean("a"))
    assert one == (3.0, None, None) and str(one) == "3.00"
    many = findings.over_seeds(cells({("s", "A"): [1, 2, 3]}), findings.mean("a"))
    assert many.value == 2 and many.low == 1 and many.high == 3  # of 27 draws one is all of the least: 3.7 %
    apart = findings.over_seeds(cells({("s", "A"): [1, 1], ("s", "B"): [5, 5]}), findings.mean("a"))
    assert (apart.low, apart.high) == (3, 3)  # cells are drawn apart: seeds of one never replace those of another
    rise = findings.over_seeds(cells({("s", "A"): [1, 2], ("s", "B"): [3]}), findings.correlation("a", "b"))
    assert rise.value == pytest.approx(1)
    left = findings.correlation("a", "b", without="B")(cells({("s", "A"): [1, 2, 3], ("s", "B"): [9]}))
    assert left == pytest.approx(1)
    assert findings.difference("B", "A", "a")(cells({("s", "A"): [1, 2], ("s", "B"): [3]})) == 1.5


# -- the whole in small ------------------------------------------------------------------------------------------------

TINY = QUICK._replace(pictures=1000, steps=450, told=160, moved=12)
SMALL: dict = {"data": ["sprites"], "seeds": 1, "quick": True, "steps": 0, "side": 0, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of two kinds on one data set."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae.__main__.QUICK", TINY)
        runs(
            out=folder, data=["sprites"], kind=["VAE", "VQ-VAE"], seeds=1, quick=True, steps=0, side=0, device="cpu", threads=1
        )
    return folder


def figures(folder, kind):
    return json.loads((folder / f"sprites-{kind}-0.json").read_text())


def test_a_study_of_two_kinds_reaches_what_it_must(made):
    vae, vq = (figures(made, kind) for kind in ("VAE", "VQ-VAE"))
    own, plain = vae["figures"], vae["figures"]["untrained"]
    assert own["unexplained"] < 0.3 and vq["figures"]["unexplained"] < 0.3
    beyond = {"infoe": 0.3, "dci_informativeness": 0.05, "dci_disentanglement": 0.015, "mig": 0.03}
    for control in (own["shuffled factors"], plain["disentanglement"]):
        assert all(own["disentanglement"][name] > control[name] + least for name, least in beyond.items())
    trained, control = findings.figures_of(vae), findings.figures_of(vae, "untrained")
    assert trained["ces"] > 20 * control["ces"] > 0
    assert trained["relative"] > 0.15 and 0 < trained["modularity"] < 1 and plain["coordinates"]["modularity"] > 0
    swap = findings.figures_of(vq)
    assert swap["swap"] > 0.02


def test_what_was_made_is_not_made_again_and_tables_say_how_many_runs_they_are_of(made, tmp_path, monkeypatch):
    monkeypatch.setattr("vae.__main__.run", lambda *_, **__: pytest.fail("it was there"))
    monkeypatch.setattr("vae.__main__.QUICK", TINY)
    runs(out=made, kind=["VAE", "VQ-VAE"], **SMALL)
    names = ("runs", "others", "strength", "bottleneck", "winners", "quantised", "truth", "all")
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "".join(f"<!-- begin: {n} -->\nstale\n<!-- end: {n} -->\n" for n in names) + "after\n")
    tables(out=made, others=made, readme=readme)
    text = readme.read_text()
    assert "Of another size:\n\n- VAE on sprites, seed 0, 32 × 32 pixels, 450 steps, " in text
    assert "**2 of 90 runs** (2 of sprites; seeds 0)" in text and "stale" not in text
    assert text.startswith("before") and text.endswith("after\n") and "steps 450" in text
    assert "| latents turned | 1.87 | 0.73 |" in text and "| one latent moves nothing |" in text
    assert text.partition("begin: all")[2].count("| sprites | VAE |") == 1 and text.count("factors shuffled") == 1
    svg = readme.with_name("scatter.svg").read_text()
    assert svg.count("<circle") == 2 + 2 and "sprites" in svg  # two runs, two kinds in the legend


def test_a_file_is_a_data_set_too(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, kind=np.arange(30) % 3)
    learned, rest = pictures(str(tmp_path / "own.npz"), QUICK._replace(pictures=18, told=12))
    assert learned.inputs.shape == (18, 3, 32, 32) and len(rest.factors["kind"]) == 12
    both = torch.cat([learned.inputs, rest.inputs]).mean((1, 2, 3)).sort().values
    torch.testing.assert_close(both, torch.as_tensor(images).float().mean((1, 2, 3)).div(255).sort().values)


def test_the_middle_picture_explains_nothing():
    class Flat(torch.nn.Module):
        def encode(self, x):
            return x

        def decode(self, z):
            return z.mean(0, keepdim=True).expand_as(z)

    x = torch.rand(5, 1, 4, 4)
    assert unexplained(Flat(), x) == pytest.approx(1)
