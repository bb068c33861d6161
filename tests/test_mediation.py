"""Through what a prompt acts: where concepts are all there is, none, or a part; text, pictures, a decoder."""

import torch
from tiny_pipelines import autoencoder

import steerlib as sl
from steerlib.evaluation.mediation import mediation


def prompts(seed):
    """Two rows of six tokens."""
    return torch.randint(1, 100, (2, 6), generator=torch.Generator().manual_seed(seed))


def spanning(model, site, count):
    """A bank of `count` directions of all that a site has."""
    axes = torch.eye(model.config.hidden_size)[:count]
    return sl.ConceptBank.from_directions({f"axis{i}": axis for i, axis in enumerate(axes)}, site=site, base=model)


def outcome(llama):
    """What is likelier at the end of a prompt."""

    def run(ids):
        with torch.no_grad():
            return llama(ids).logits[:, -1, :5].log_softmax(-1)

    return run


def test_all_goes_through_all_that_a_layer_has_and_a_part_through_a_part(llama):
    width, (value, reference) = llama.config.hidden_size, (prompts(seed=1), prompts(seed=2))
    shares = {}
    for count in (1, width):
        bank = spanning(llama, "layers.1", count)
        found = mediation(llama, bank, list(bank.concepts), outcome(llama), value=value, reference=reference)
        torch.testing.assert_close(found.te, found.nde + found.tie, atol=1e-5, rtol=0)
        assert found.te.abs().max() > 1e-3
        shares[count] = float(found.tie.norm() / found.te.norm())
        if count == width:  # the layers behind see nothing else
            torch.testing.assert_close(found.tie, found.te, atol=1e-4, rtol=0)
            torch.testing.assert_close(found.nie, found.te, atol=1e-4, rtol=0)
    assert shares[1] < 0.9


def test_nothing_goes_through_anything_where_prompts_are_the_same(llama, bank):
    found = mediation(llama, bank, ["a", "b"], outcome(llama), value=prompts(seed=1), reference=prompts(seed=1))
    assert all(float(effect.abs().max()) < 1e-5 for effect in found[:4])


def test_a_decoder_of_pictures_shows_latents_through_its_channels():
    vae = autoencoder().eval()
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    axes = {f"channel{i}": axis for i, axis in enumerate(torch.eye(4))}
    bank = sl.ConceptBank.from_directions(axes, site="decoder.in:BDN", base=vae)

    def run(latents):
        with torch.no_grad():
            return vae.decode(latents).sample

    whole = mediation(vae, bank, list(axes), run, value=z, reference=-z)
    torch.testing.assert_close(whole.tie, whole.te, atol=1e-3, rtol=0)
    part = mediation(vae, bank, ["channel0"], run, value=z, reference=-z)
    assert float((part.tie - part.te).norm() / part.te.norm()) > 0.01
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())
