"""Directions of words: equal to the product with the whole Jacobian, named by words, ready to steer with."""

import pytest
import torch
from tiny_models import tiny, toy_tokenizer

import steerlib as sl
from steerlib.errors import (
    BadBank,
    BadRecipe,
    CorruptBank,
    Unanswerable,
    UnknownConcept,
    UnknownFormat,
    UnsupportedTarget,
    WrongWidth,
)
from steerlib.hosts import host_for
from steerlib.training.calibrate.doses import statistics
from steerlib.training.directions.lens import word_directions
from steerlib.training.package import word_bank
from steerlib.training.record.activations import tokens
from steerlib.vocabulary import forms

TEXTS = ["the old river runs down now", "a cold wind walks here and", "snow falls"]


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


def test_padding_and_batches_change_nothing(tokenizer):
    model = causal("llama", tokenizer)
    together = word_directions(model, tokenizer, ["river"], TEXTS * 4, skip=1)["river"]
    read = [len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS]
    apart = [word_directions(model, tokenizer, ["river"], [text], skip=1)["river"] for text in TEXTS]
    for site, direction in together.items():
        mean = sum(n * one[site] for n, one in zip(read, apart, strict=True)) / sum(read)
        torch.testing.assert_close(direction, mean, rtol=1e-4, atol=1e-6)


def test_the_first_order_effect_on_the_logit_is_the_inner_product(tokenizer):
    """Added everywhere from position `skip` on, a small step moves the summed logit by what the direction says."""
    model, skip, epsilon = causal("llama", tokenizer), 1, 1e-2
    rows, text = model.lm_head.weight.detach(), TEXTS[0]
    found = word_directions(model, tokenizer, ["river"], [text], skip=skip)["river"]["layers.0"]
    step = torch.randn(len(found), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([tokenizer(text)["input_ids"]])

    def total(amount):
        bank = sl.ConceptBank.from_directions({"step": step}, site="layers.0", base=model)
        with sl.steer(model, bank, {"step": sl.Add(amount, tokens=slice(skip, None))}), torch.no_grad():
            logits = model(ids).logits[0]
        words = forms(tokenizer, "river", rows)
        return float((logits[:, words].mean(-1) - logits.mean(-1)).sum())

    change = (total(epsilon) - total(-epsilon)) / (2 * epsilon)
    assert change == pytest.approx((ids.shape[1] - skip) * float(found @ step), rel=1e-2)


def test_several_words_are_the_mean_of_theirs_and_spaces_before_them_change_nothing(tokenizer):
    model = causal("llama", tokenizer)
    found = word_directions(model, tokenizer, ["river moon", " river", "moon"], TEXTS, sites=["layers.1"], skip=1)
    both, one, other = (found[name]["layers.1"] for name in found)
    torch.testing.assert_close(both, (one + other) / 2, rtol=1e-4, atol=1e-6)


def test_plurals_count_where_the_unembedding_has_them_near():
    own = ["<pad>", "<s>", "</s>", "▁new", "▁news", "▁river", "▁rivers", "▁River", "▁city", "▁cities"]
    words = {name: k for k, name in enumerate([*own, *(f"▁x{k}" for k in range(40))])}
    tokenizer = toy_tokenizer()
    vocabulary = tokenizer.backend_tokenizer.model.__class__(words, unk_token="▁x0")
    tokenizer.backend_tokenizer.model = vocabulary
    rows = torch.randn(len(words), 16, generator=torch.Generator().manual_seed(0))
    rows[6], rows[9], rows[4] = rows[5] + 0.1 * rows[6], rows[8] + 0.1 * rows[9], -rows[3]
    assert forms(tokenizer, "river", rows) == [5, 7, 6]
    assert forms(tokenizer, " city", rows) == [8, 9]
    assert forms(tokenizer, "new", rows) == [3]
    assert forms(tokenizer, "axolotl", rows) == []


def test_what_has_no_later_tokens_is_refused(tokenizer):
    model = causal("llama", tokenizer)
    with pytest.raises(UnknownConcept, match="'axolotl'"):
        word_directions(model, tokenizer, ["river", "axolotl"], TEXTS)
    with pytest.raises(BadRecipe, match="more than 4 tokens"):
        word_directions(model, tokenizer, ["river"], ["snow falls"])
    with pytest.raises(UnsupportedTarget, match="evaluation mode"):
        word_directions(causal("llama", tokenizer).train(), tokenizer, ["river"], TEXTS)
    bert = tiny("bert", vocab_size=len(tokenizer), is_decoder=False)
    with pytest.raises(UnsupportedTarget, match="reads later ones"):
        word_directions(bert, tokenizer, ["river"], TEXTS, sites=["layers.0"], skip=1)
    with pytest.raises(UnsupportedTarget, match="one unembedding"):
        word_directions(model.model, tokenizer, ["river"], TEXTS)


# -- the bank ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lazy(tokenizer, monkeypatch):
    monkeypatch.setattr(word_bank._Words, "texts", TEXTS * 6)
    model = causal("llama", tokenizer)
    return model, sl.words(model, tokenizer)


def test_a_word_is_made_when_asked_for_and_kept(lazy, monkeypatch):
    model, bank = lazy
    assert len(bank) == 0 and "river" in bank and " river" in bank and "axolotl" not in bank
    with pytest.raises(UnknownConcept, match="one token"):
        bank["axolotl"]
    made = bank["river"]
    monkeypatch.setattr(word_bank, "word_directions", None)
    assert bank[" river"] is made is bank["river"] and list(bank) == ["river"]
    assert [concept.name for concept in bank.find("river")] == ["river"]
    assert "every other word" in repr(bank)


def test_units_and_amounts_are_those_of_every_other_direction(lazy, tokenizer):
    model, bank = lazy
    (site,), concept = bank.sites, bank["river"]
    x = tokens(model, tokenizer, TEXTS * 6, [site], what="")[site]
    raw = word_directions(model, tokenizer, ["river"], (TEXTS * 6)[: word_bank.TEXTS], sites=[site])["river"][site]
    fact = statistics(raw / raw.norm(), x)
    assert (concept.unit, concept.natural) == (fact.std, (fact.low, fact.high))
    assert bank.sites[site].norm == pytest.approx(float(x.norm(dim=-1).median()), abs=1e-4)
    added = concept.useful * concept.unit * bank.rows(concept).write.norm()
    assert float(added) == pytest.approx(word_bank.USEFUL * bank.sites[site].norm, rel=1e-3)
    torch.testing.assert_close(bank.rows(concept).write[0], raw / raw.norm())


def test_words_steer_together_and_a_saved_bank_has_those_made_so_far(lazy, tmp_path):
    model, bank = lazy
    ids, edits = torch.arange(4, 12)[None], {" moon": 2.0, "river": -1.0}
    with sl.steer(model, bank, edits):
        steered = model(ids).logits
    again = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "words"))
    again.verify()
    assert list(again) == ["moon", "river"] and "tree" not in again
    with sl.steer(model, again, {"moon": 2.0, "river": -1.0}):
        assert torch.equal(model(ids).logits, steered)
    assert not torch.equal(model(ids).logits, steered)


def test_a_word_is_not_made_from_a_steered_model(lazy):
    model, bank = lazy
    bank["moon"]
    with sl.steer(model, bank, {"moon": 2.0}):
        with pytest.raises(Unanswerable, match="before"):
            bank["river"]
        assert bank["moon"].name == "moon"
    with torch.inference_mode():
        assert bank["river"].name == "river"
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())


def test_the_tokenizer_is_the_models_own(lazy, tokenizer, tmp_path):
    model, _ = lazy
    with pytest.raises(UnsupportedTarget, match="give tokenizer="):
        sl.words(model)
    with pytest.raises(BadBank, match="give the model's own"):
        sl.words(tiny("llama", vocab_size=32), tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, own = sl.load(str(tmp_path))
    assert host_for(loaded).tokenizer() is own
    again = type(model).from_pretrained(tmp_path)
    assert len(host_for(again).tokenizer()) == len(tokenizer)


# -- lenses of others --------------------------------------------------------------------------------------------


def layouts(J):
    """The same matrices as files may hold them."""
    named = {"model_id": "org/tiny", "d_model": 32, "n_layers": 2, "n_prompts": 8}
    yield "by layer", {0: J[0], 1: J[1]}
    yield "named", {"J": {"layers.0": J[0], "layers.1": J[1]}, **named}
    yield "texts", {"J_0": J[0], "J_1": J[1], **named}
    yield "stacked", {"jacobians": torch.stack(J), **named}
    yield "some", {"lens": [J[1]], "layers": [1], **named}
    yield "half", {"J": torch.stack(J).half(), **named}


@pytest.fixture(scope="module")
def lens(tokenizer):
    """A model whose final norm scales, and its Jacobians before that norm."""
    model = causal("llama", tokenizer)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5)
    return model, [torch.randn(32, 32, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]


@pytest.mark.parametrize("case", ["by layer", "named", "texts", "stacked", "some", "half"])
def test_a_lens_gives_the_same_directions_however_it_lies_in_its_file(case, lens, tokenizer, tmp_path):
    model, J = lens
    torch.save(dict(layouts(J))[case], tmp_path / "tiny_jacobian_lens.pt")
    bank = sl.read_bank(tmp_path, base=model, tokenizer=tokenizer, words=["river", " moon"])
    assert bank.provenance["format"] == "jacobian-lens" and list(bank) == ["river", "moon"]
    rows = model.lm_head.weight.detach()
    aim = (rows[forms(tokenizer, "river", rows)].mean(0) - rows.mean(0)) * model.model.norm.weight.detach()
    expected = aim @ J[1]
    found = bank.rows(bank["river"]).write[0]
    torch.testing.assert_close(found, expected / expected.norm(), rtol=0, atol=2e-3 if case == "half" else 1e-5)
    with sl.steer(model, bank, {"river": 1.0}), torch.no_grad():
        model(torch.arange(3, 8)[None])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"J": {"layers.0": torch.eye(32), "layer_0": torch.eye(32)}}, UnknownFormat, "one matrix"),
        ({"J": torch.zeros(2, 32, 16)}, CorruptBank, "sides"),
        ({"d_model": 64}, CorruptBank, "64"),
        ({"n_layers": 1}, CorruptBank, "n_layers"),
        ({"jacobian": torch.zeros(2, 32, 32)}, UnknownFormat, "J and jacobian"),
        ({"whitened": True}, UnknownFormat, "ignore"),
        ({"J": torch.zeros(2, 8, 8), "d_model": 8}, WrongWidth, "width 8"),
        ({"J": "none"}, UnknownFormat, "a matrix|one matrix"),
    ],
)
def test_a_lens_that_is_not_understood_is_refused(change, error, words, lens, tokenizer, tmp_path):
    model, J = lens
    torch.save({"J": torch.stack(J), "d_model": 32, "n_layers": 2} | change, tmp_path / "lens.pt")
    with pytest.raises(error, match=words):
        sl.read_bank(tmp_path / "lens.pt", "jacobian-lens", base=model, tokenizer=tokenizer, words=["river"])


def test_a_lens_needs_words_and_their_model(lens, tokenizer, tmp_path):
    model, J = lens
    torch.save({0: J[0]}, tmp_path / "lens.pt")
    with pytest.raises(BadBank, match="words="):
        sl.read_bank(tmp_path, "jacobian-lens", base=model)
    with pytest.raises(BadBank, match="loaded model"):
        sl.read_bank(tmp_path, "jacobian-lens", base="org/tiny", words=["river"])
    with pytest.raises(BadBank, match="layer=, one of 0"):
        sl.read_bank(tmp_path, "jacobian-lens", base=model, tokenizer=tokenizer, words=["river"])
    assert list(sl.read_bank(tmp_path, base=model, tokenizer=tokenizer, words=["river"], layer=0).sites) == ["layers.0"]
