"""Finding concepts by words and by meaning."""

import numpy as np
import pytest
import torch

import steerlib as sl
from steerlib.bank import search, sentences
from steerlib.bank.concept_bank import SiteFacts

LABELS = ("on “the”, “of”", "on “king”, “queen”", "on “tea”, “cup”", "towards “palace”, “throne”", "on “seven”, “nine”", "")
CONTEXTS = (("out «of» season",), (), ("a royal «tea»",), (), ("all «seven» of them",), ("a violin «plays»",))


@pytest.fixture
def bank():
    encoder = sl.Directions(torch.eye(len(LABELS), 8))
    concepts = [
        sl.Concept(name=f"layers.0/{i}", encoder="layers.0", index=i, label=label, examples=examples)
        for i, (label, examples) in enumerate(zip(LABELS, CONTEXTS, strict=True))
    ]
    return sl.ConceptBank("made", concepts, {"layers.0": encoder}, base=sl.BaseModel(), sites={"layers.0": SiteFacts(width=8)})


@pytest.fixture
def without_sentences(monkeypatch):
    monkeypatch.setattr(sentences, "PACKAGE", "no_such_package")


def found(bank, words, limit=5):
    return [concept.index for concept in bank.find(words, limit)]


def test_concepts_are_ranked_by_shared_words_and_by_the_cosine_of_meanings(bank):
    texts = [*LABELS[:-1], CONTEXTS[-1][0]]
    cosine = sentences.embed(texts) @ sentences.embed(["royal"])[0]
    expected = cosine + np.array([0, 0, 0.5, 0, 0, 0])  # the one whose context has the word
    assert found(bank, "royal") == [int(i) for i in np.argsort(-expected) if expected[i] > search.ALIKE]
    assert {1, 2, 3} <= set(found(bank, "royal")) and not {0, 4} & set(found(bank, "royal"))
    assert found(bank, "music for strings")[0] == 5 and found(bank, "numbers", 1) == [4]


def test_without_the_sentence_model_words_alone_count(bank, without_sentences):
    assert found(bank, "royal") == [2] and found(bank, "king") == [1] and found(bank, "monarchs") == []
    assert found(bank, "the royal king") == [0, 1, 2]  # one of three words each, the last in its context
    assert found(bank, "LAYERS.0/3") == [3, 0, 1, 2, 4]  # the name itself, before those that share a part of it


def test_what_resembles_nothing_is_not_found(bank):
    assert bank.find("photosynthesis") == []
    shipped = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    assert shipped.find("zebra") == [] and shipped.find("soccer")[0].name == "sports"
    assert shipped.find("sports")[0].name == "sports"


def test_labels_are_embedded_once(bank, monkeypatch):
    bank.find("royal")
    asked = []
    embed = sentences.embed
    monkeypatch.setattr(sentences, "embed", lambda texts: asked.extend(texts) or embed(texts))
    bank.find("kings")
    assert asked == ["kings"]
