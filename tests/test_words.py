"""Directions of words: equal to the product with the whole Jacobian, named by words, ready to steer with."""

import pytest
import torch
from tiny_models import tiny, toy_tokenizer

from steerlib.training.directions.lens import forms, word_directions

TEXTS = [
    "the old river runs down the green hill now",
    "a cold wind walks here",
    "snow falls slowly and the moon sings over the white town",
]


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def causal(family, tokenizer):
    return tiny(family, vocab_size=len(tokenizer), initializer_range=0.3)


def jacobian(model, site, ids, skip):
    """J by loops: the sum over later positions p' of d y[p'] / d h[p], summed over positions p from `skip` on."""
    blocks, seen = model.get_decoder().layers, []
    first = blocks[site].register_forward_hook(lambda m, args, out: seen.append(out.detach().requires_grad_()) or seen[0])
    last = model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids[None])
    for hook in (first, last):
        hook.remove()
    h, y = seen
    rows = []
    for d in range(y.shape[-1]):
        total = torch.zeros(h.shape[-1])
        for p in range(skip, ids.shape[0]):
            for later in range(p, ids.shape[0]):
                total += torch.autograd.grad(y[0, later, d], h, retain_graph=True)[0][0, p]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_direction_is_the_product_with_the_whole_jacobian(family, tokenizer):
    model, skip = causal(family, tokenizer), 2
    found = word_directions(model, tokenizer, ["river", " moon"], TEXTS, skip=skip)
    read = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    count = sum(len(ids) - skip for ids in read)
    rows = model.lm_head.weight.detach()
    for site in (0, 1):
        J = sum(jacobian(model, site, ids, skip) for ids in read) / count
        for word in found:
            aim = rows[forms(tokenizer, word, rows)].mean(0) - rows.mean(0)
            torch.testing.assert_close(found[word][f"layers.{site}"], aim @ J, rtol=1e-4, atol=1e-5)
