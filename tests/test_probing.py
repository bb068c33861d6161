"""Selecting and probing latents, on codes whose meaning is known."""

import numpy as np
import pytest
import torch

from steerlib.encoders import ReLU
from steerlib.errors import BadRecipe
from steerlib.evaluation.probing import SIZES, Attribute, halves, selection, sparse_probe


def labelled(texts=80, latents=40, *, seed=0):
    """Readings of which latent 7 tells the label, latent 3 tells its opposite, less well, and latent 5 never fires."""
    g = torch.Generator().manual_seed(seed)
    y = torch.rand(texts, generator=g) < 0.5
    z = torch.rand(texts, latents, generator=g)
    z[:, 7] += 2.0 * y
    z[:, 3] += 0.5 * ~y
    z[:, 5] = 0
    return z, y


def test_selection_is_pearsons_correlation_and_orders_as_the_f_statistic():
    from sklearn.feature_selection import f_classif

    z, y = labelled()
    z[:, 8] = 1000 * z[:, 7]  # the unit of a latent does not matter
    score = selection(z, y)
    known = [i for i in range(40) if i != 5]
    expected = np.corrcoef(z[:, known].T.numpy(), y.numpy())[-1, :-1]
    np.testing.assert_allclose(score[known], expected, atol=1e-5)
    assert score[5] == 0 and score[7] > 0.9 and score[3] < -0.4 and score[8] == pytest.approx(float(score[7]), abs=1e-6)
    f, _ = f_classif(z[:, known].numpy(), y.numpy())
    np.testing.assert_allclose(f, expected**2 / (1 - expected**2) * (len(y) - 2), rtol=1e-3, atol=1e-3)


def test_a_probe_of_one_latent_is_as_good_as_that_latent():
    z, y = labelled(400)
    assert sparse_probe(z, y, 1) == 1.0
    z[:, 7] = 0
    learn = halves(y)
    below = z[learn, 3].double()
    best = max(float(((below > cut) == ~y[learn]).double().mean()) for cut in below)
    assert sparse_probe(z, y, 1) == pytest.approx(best, abs=0.06) and best < 1
    noise = torch.rand(400, 40, generator=torch.Generator().manual_seed(1))
    assert all(abs(sparse_probe(noise, y, k) - 0.5) < 0.12 for k in SIZES)


def test_texts_are_held_out_by_kind():
    y = torch.tensor([True, True, False, True, False, False, False])
    assert halves(y).tolist() == [True, False, True, True, False, True, False]
    z, labels = labelled(200)
    shuffled = labels.clone()
    shuffled[~halves(labels)] = ~shuffled[~halves(labels)]
    z[:, 7] = labels.float()  # learned from one half, it is wrong on every text of the other
    learn = halves(labels)
    assert sparse_probe(z, labels, 1) == 1.0 and float((z[~learn, 7].bool() == shuffled[~learn]).float().mean()) == 0.0


def described(texts, *, width=32, seed=0):
    """Tokens that are one of many directions; of texts with the attribute, one token is direction 2."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(128, width, generator=g), dim=-1)
    found = []
    for i in range(texts):
        which = torch.randint(3, 128, (60,), generator=g)
        which[0] = 2 if i % 2 else which[0]
        found.append(2 * dictionary[which] + 0.05 * torch.randn(60, width, generator=g))
    return dictionary, Attribute.of(found[1::2], found[0::2])


def test_the_dictionary_that_made_the_texts_tells_by_one_latent_what_a_random_one_does_not():
    dictionary, attribute = described(120)
    encoder = ReLU(encoder=dictionary, bias=torch.full((128,), -1.6), decoder=dictionary)
    latents, scores = attribute.best(encoder, 3)
    assert latents[0] == 2 and scores[0] > 0.9 and (scores.diff() <= 0).all()
    found = attribute.probes(encoder)
    assert found.latents[1] == 1.0 and found.control[1] < 0.95
    assert found.channels[1] < 0.75 and found.dense < 0.75  # linear in the mean activation there is little to see
    torch.testing.assert_close(attribute.readings(encoder)[0], encoder.encode(attribute.x[0]).mean(0))


def test_too_few_texts_are_refused():
    x = [torch.ones(2, 4)] * 4
    with pytest.raises(BadRecipe, match="4 texts"):
        Attribute.of(x, x[:3])
    with pytest.raises(BadRecipe, match="two tokens"):
        Attribute.of(x, [*x, torch.ones(0, 4)])
