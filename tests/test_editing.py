"""Banks made of banks: merged, added to, renamed, relabelled, selected from. What stays acts by the same bits."""

import random
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import two_directions
from test_bank import make
from tiny_models import tiny

import steerlib as sl
from steerlib import errors
from steerlib.graph.page import THUMBNAIL

SHIPPED = ("smollm2-135m-instruct", "scenes-32", "smollm2-135m-latents", "faces-32-latents")


@pytest.fixture(scope="module")
def shipped():
    return {name: sl.ConceptBank.from_pretrained(name) for name in SHIPPED}


def same_rows(bank, concept, other, again):
    """Whether a concept and its gate are read, written, capped and timed alike in two banks."""
    for at, there in zip(concept.places, again.places, strict=True):
        if not all(map(same, bank.rows(at), other.rows(there))):
            return False
        told: Any = [
            (one.site_of(x), one.read_at(x), one.norm_of(x), one.window_of(x)) for one, x in ((bank, at), (other, there))
        ]
        if told[0] != told[1] or (at.unit, at.natural) != (there.unit, there.natural):
            return False
    left = ("range", "useful", "useful_as", "beyond", "match_norm", "present", "examples")
    if any(getattr(concept, name) != getattr(again, name) for name in left) or (concept.gate is None) != (again.gate is None):
        return False
    if concept.gate is None or concept.gate.concept == concept.name:
        return True
    return same_rows(bank, bank[concept.gate.concept], other, other[again.gate.concept])


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Edited:
    """A bank under random edits, and for each of its concepts the bank and the concept it came from."""

    def __init__(self, bank, seed, folder):
        self.bank, self.rng, self.folder = bank, random.Random(seed), folder
        self.origin = {name: (bank, concept) for name, concept in bank.concepts.items()}
        self.labels = {name: concept.label for name, concept in bank.concepts.items()}

    def some(self, most):
        return self.rng.sample(sorted(self.origin), min(most, len(self.origin)))

    def rename(self):
        names = {name: f"{name.replace('/', '-')} {self.rng.randrange(10**6)}" for name in self.some(3)}
        self.bank = self.bank.rename(names)
        for table in (self.origin, self.labels):
            moved = {names.get(name, name): value for name, value in table.items()}
            table.clear()
            table.update(moved)

    def relabel(self):
        chosen = set(self.some(3))
        self.bank = self.bank.relabel(lambda concept: f"said {concept.name}" if concept.name in chosen else None)
        self.labels.update({name: f"said {name}" for name in chosen})

    def keep(self, names):
        self.origin = {name: self.origin[name] for name in names}
        self.labels = {name: self.labels[name] for name in names}

    def select(self):
        self.bank = self.bank.select(*self.some(max(4, len(self.origin) // 2)))
        assert set(self.bank) <= set(self.origin)
        self.keep(self.bank)

    def drop(self):
        gates = {concept.gate.concept for concept in self.bank.concepts.values() if concept.gate}
        self.bank = self.bank.drop(*(gone := [name for name in self.some(2) if name not in gates]))
        assert set(self.bank) == set(self.origin) - set(gone)
        self.keep(self.bank)

    def add(self):
        site = self.rng.choice(sorted(self.bank.sites))
        vector, name = torch.randn(self.bank.sites[site].width), f"added {self.rng.randrange(10**6)}"
        self.bank = self.bank.add(name, vector, site=site, label="mine")
        assert torch.equal(self.bank.rows(self.bank[name]).write[0], vector)
        self.origin[name], self.labels[name] = (self.bank, self.bank[name]), "mine"

    def merge(self):
        prefix, width = f"{self.rng.randrange(10**6)}: ", 32
        other = make(width=width, base=self.bank.base)
        self.bank = self.bank.merge(other, prefix=prefix)
        self.origin |= {prefix + name: (other, concept) for name, concept in other.concepts.items()}
        self.labels |= {prefix + name: concept.label for name, concept in other.concepts.items()}

    def reopen(self):
        place = self.folder / str(self.rng.randrange(10**6))
        self.bank = sl.ConceptBank.from_pretrained(self.bank.save_pretrained(place))

    def check(self):
        assert set(self.bank) == set(self.origin)
        assert {name: concept.label for name, concept in self.bank.concepts.items()} == self.labels
        for name in self.some(25):
            assert same_rows(*self.origin[name], self.bank, self.bank[name]), name
        assert {end for edge in self.bank.graph.edges for end in (edge.src, edge.dst)} <= set(self.bank)
        self.bank.verify()


# -- every shipped bank ----------------------------------------------------------------------------------------------

VERBS = ("rename", "relabel", "select", "drop", "add", "merge", "reopen")


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for seed, name in enumerate((*SHIPPED, *SHIPPED[:2]))])
def test_a_shipped_bank_under_random_edits_says_the_same_and_so_after_saving(name, seed, shipped, tmp_path):
    """Each edit once, then some again, in random order; saved and opened in between and at the end."""
    torch.manual_seed(seed)
    edited, left = Edited(shipped[name], seed, tmp_path), sl.ConceptBank.from_pretrained(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.Unmeasured)
        for verb in (*edited.rng.sample(VERBS, len(VERBS)), *edited.rng.sample(VERBS, 3)):
            getattr(edited, verb)()
    edited.check()
    edited.reopen()
    edited.check()
    assert list(shipped[name]) == list(left) and shipped[name].card == left.card  # what it was made of is as before


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_bank_merged_with_itself_is_saved_and_reads_the_same_twice(name, shipped, tmp_path):
    bank = shipped[name].select(*list(shipped[name])[-6:])
    both = bank.merge(bank, prefix="twin ") if all(c.name != c.id for c in bank.concepts.values()) else bank.merge(bank)
    again = sl.ConceptBank.from_pretrained(both.save_pretrained(tmp_path / "both"))
    assert len(again) == 2 * len(bank) and len(again.encoder_facts) == 2 * len(bank.encoder_facts)
    own = list(bank.concepts.values())
    for concept, first, second in zip(
        own, [*again.concepts.values()][: len(own)], [*again.concepts.values()][len(own) :], strict=True
    ):
        assert same_rows(bank, concept, again, first) and same_rows(bank, concept, again, second)
        assert first.id != second.id


def test_concepts_of_two_shipped_banks_in_one_act_by_the_bits_that_they_have_alone(real, shipped):
    """At layers.15 the two banks measured other lengths of activations, by which `music` is matched and all are capped."""
    model, tokenizer = real
    inputs = tokenizer("Dear all, the meeting", return_tensors="pt")
    styles, latents = shipped["smollm2-135m-instruct"], shipped["smollm2-135m-latents"]
    both = latents.merge(styles).rename({"music": "songs", "layers.15/7": "seven"})
    assert both["songs"].match_norm and both.norm_of(both["songs"]) == styles.norm_of(styles["music"])
    for old, name, bank in (("music", "songs", styles), ("layers.15/7", "seven", latents), ("cooking", "cooking", styles)):
        logits = []
        for one, key in ((bank, old), (both, name)):
            with torch.no_grad(), sl.steer(model, one, {key: 2.0}):
                logits.append(model(**inputs).logits)
        assert torch.equal(*logits)


# -- what else a bank says --------------------------------------------------------------------------------------------

CARD = """---
model-index:
- name: made
  results:
  - metrics:
    - type: 'concept 1: score'
      value: 0.5
      name: 'concept 1, steered by its useful amount: score of the concept'
---

# made

| concept | meaning |
|---|---|
| concept 1 | number 1, ünïcode |
| kind: concept 2 | number 2, ünïcode |

`sl.steer(model, bank, {"concept 2": 2.0})` and concept 1 in prose.
"""


def described():
    """A bank whose card, graph, effects and pictures name its concepts."""
    bank = make(base=sl.BaseModel(id="org/model"))
    effects = {"concept": "concept 1", "label": "number 1, ünïcode"}
    concepts = [replace(c, effects=effects) if c.name == "concept 1" else c for c in bank.concepts.values()]
    pictures = {THUMBNAIL.format("one"): b"\x89PNG1", "effects.png": b"\x89PNG2"}
    return bank.with_concepts(concepts, card=CARD, pictures=pictures)


def test_a_new_name_stands_in_gates_effects_graph_and_card(tmp_path):
    bank = described().rename({"concept 0": "zero", "concept 1": "concept 2", "concept 2": "concept 1"})
    assert [edge.src for edge in bank.graph.edges] == ["zero"] and bank.graph.edges[0].dst == "concept 2"
    assert bank["concept 2"].gate == sl.Gate("zero", above=0.5, full=1.5)
    assert bank["concept 2"].effects["concept"] == "concept 2" and bank["concept 2"].index == 1
    assert "type: 'concept 2: score'" in bank.card and "'concept 2, steered by its useful" in bank.card
    assert "| concept 2 | number 1, ünïcode |\n| kind: concept 1 | number 2" in bank.card
    assert '{"concept 1": 2.0}' in bank.card and "and concept 1 in prose" in bank.card
    assert list(sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))) == ["zero", "concept 2", "concept 1"]


def test_the_picture_of_a_concept_follows_its_name():
    bank = described()
    bank = bank.rename({"concept 0": "one"}).rename({"one": "two"})
    assert bank.pictures == {THUMBNAIL.format("two"): b"\x89PNG1", "effects.png": b"\x89PNG2"}
    assert THUMBNAIL.format("two") not in bank.drop("concept 1", "concept 2", "two").pictures


def test_a_new_label_stands_in_effects_and_card(tmp_path):
    bank = described().relabel(lambda c: "first | one" if c.index == 1 else None)
    assert bank["concept 1"].effects["label"] == bank["concept 1"].label == "first | one"
    assert bank["concept 1"].source == "" and bank["concept 2"].source == "made up"
    assert "| concept 1 | first \\| one |" in bank.card and "| kind: concept 2 | number 2, ünïcode |" in bank.card
    assert "Note:" not in bank.card
    bank.save_pretrained(tmp_path / "bank")
    prose = described().with_concepts(card="about number 1, ünïcode")
    told = prose.relabel(lambda c: "new" if c.index == 1 else None).card
    assert "“concept 1” got another label" in told and told.endswith("about number 1, ünïcode")


def test_a_card_tells_no_figures_of_what_is_left_out():
    bank = described().drop("concept 1", "concept 2")
    assert "score" not in bank.card and "number" not in bank.card
    assert "does not have “concept 2” any more" in bank.card  # its code still names it
    assert "Note:" not in described().drop("concept 1").card


def test_what_gates_a_concept_is_selected_with_it_and_not_dropped_without_it():
    bank = described()
    assert list(bank.select("concept 2")) == ["concept 2", "concept 0"]
    with pytest.raises(errors.BadBank, match="'concept 1' acts where 'concept 0' shows; drop it too"):
        bank.drop("concept 0")


def test_an_effect_through_what_goes_is_said():
    edges = [sl.Edge(src="concept 0", dst="concept 1", weight=1.0), sl.Edge(src="concept 1", dst="concept 2", weight=1.0)]
    bank = make().with_concepts(graph=sl.CausalGraph(edges))
    with pytest.warns(errors.Unmeasured, match="'concept 0' moves 'concept 2' through concepts that are not kept"):
        assert len(bank.drop("concept 1").graph) == 0


def test_encoders_that_nothing_needs_go_and_the_others_keep_their_rows():
    model = tiny("llama")
    bank = two_directions(model).add("c", torch.ones(model.config.hidden_size), site=1)
    assert bank["c"].id == "layers.1/0" and bank.sites.keys() == {"layers.0", "layers.1"}
    left = bank.drop("a")
    assert left["b"].id == "layers.0/1" and left.encoder_facts.keys() == {"layers.0", "layers.1"}
    assert left.drop("b").encoder_facts.keys() == left.drop("b").sites.keys() == {"layers.1"}


# -- added -----------------------------------------------------------------------------------------------------------


def test_an_added_vector_moves_its_sites_by_itself_and_learns():
    model = tiny("llama")
    bank, width = two_directions(model), model.config.hidden_size
    one, other = torch.randn(width, requires_grad=True), torch.randn(width)
    more = bank.add("c", {0: one, 1: other}, unit=2.0, gate=sl.Gate("a", above=-1e9), label="mine")
    assert [(p.id, p.unit) for p in more["c"].places] == [("layers.0#added/0", 2.0), ("layers.1/0", 2.0)]
    with sl.record(model, ["layers.0"]) as plain:
        model(torch.ones(1, 3, dtype=torch.long))
    with sl.steer(model, more, {"c": 1.0}), sl.record(model, ["layers.0"]) as moved:
        loss = model(torch.ones(1, 3, dtype=torch.long)).logits.sum()
    change = moved["layers.0"][0][1] - plain["layers.0"][0][1]
    torch.testing.assert_close(change, 2 * one.detach().expand_as(change))
    loss.backward()
    assert one.grad is not None and one.grad.norm() > 0


def test_a_combination_is_added_by_name():
    model = tiny("llama")
    bank = two_directions(model)
    more = bank.add("mere b", bank["b"] - bank["a"], label="b alone")
    torch.testing.assert_close(more.rows(more["mere b"]).write, bank.rows(bank["b"] - bank["a"]).write)
    assert more["mere b"].label == "b alone" and list(more) == ["a", "b", "mere b"]


# -- joined ----------------------------------------------------------------------------------------------------------


def test_what_two_banks_call_alike_is_kept_apart():
    bank = described()
    both = bank.merge(bank.with_concepts(pictures={"effects.png": b"\x89PNG3"}, card="![](effects.png)"), prefix="my ")
    assert both["my concept 1"].gate == sl.Gate("my concept 0", above=0.5, full=1.5)
    assert both["my concept 1"].encoder == "layers.0@late#dir+my" and both["concept 1"].encoder == "layers.0@late#dir"
    assert [(edge.src, edge.dst) for edge in both.graph.edges] == [("concept 0", "concept 1"), ("my concept 0", "my concept 1")]
    assert both.pictures["effects.png"] == b"\x89PNG2" and both.pictures["effects-2.png"] == b"\x89PNG3"
    assert both.card.startswith(CARD.rstrip()) and both.card.endswith("![](effects-2.png)\n")
    assert both.provenance["merged"] == [{"name": "made", "license": "apache-2.0", "provenance": {"seed": 0}}]
    assert (
        both.license == "apache-2.0"
        and bank.merge(bank.with_concepts(license="mit"), prefix="b ").license == "apache-2.0 AND mit"
    )
    assert bank.merge(bank.with_concepts(license=""), prefix="b ").license == ""


def test_windows_of_one_level_that_differ_are_kept_apart():
    early, late = (make().with_concepts(levels={"late": sl.Window(*ends)}) for ends in ((0.0, 0.4), (0.5, 1.0)))
    both = early.merge(late, prefix="b ")
    assert both.window_of(both["concept 1"]) == sl.Window(0.0, 0.4)
    assert both.window_of(both["b concept 1"]) == sl.Window(0.5, 1.0)
    assert both["b concept 1"].encoder == "layers.0@late+#dir"
    again = both.merge(early, prefix="c ")
    assert (
        again.window_of(again["c concept 1"]) == sl.Window(0.0, 0.4) and again["c concept 1"].encoder == "layers.0@late#dir+c"
    )


def test_a_concept_of_unknown_length_is_not_capped_by_another_banks():
    model = tiny("llama")
    own = two_directions(model)
    other = sl.ConceptBank.from_directions({"c": torch.ones(32)}, site=0, base=model, norm=0.5)
    for both in (own.merge(other), other.merge(own)):
        assert both.norm_of(both["a"]) is None and both.norm_of(both["c"]) == 0.5
        sl.steer(model, both, {"a": 50.0})
        with pytest.warns(errors.OutOfRange, match="is capped"):
            sl.steer(model, both, {"c": 50.0})


# -- several at once ---------------------------------------------------------------------------------------------------


def test_edits_and_gates_name_concepts_of_several_banks():
    """By hand: `c` of the second bank where `a` of the first reads above a bound, beside the `b` of the second, and `a`."""
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7, 8]])
    first = two_directions(model)
    c, x = torch.linspace(-1, 1, 32), torch.linspace(1, 0, 32)
    second = sl.ConceptBank.from_directions({"c": c, "b": x}, site=0, base=model, name="other")
    with torch.no_grad(), sl.record(model, first, ["a"]) as tape, sl.record(model, ["layers.0"]) as plain:
        model(ids)
    reading = tape["a"][0][1][0]
    bound = float(reading.median())
    edits: dict[Any, Any] = {"c": sl.Add(2.0, gate=sl.Gate("a", above=bound)), "other/b": 1.0, "a": 0.5}
    with torch.no_grad(), sl.steer(model, [first, second], edits), sl.record(model, ["layers.0"]) as moved:
        model(ids)
    wanted = 2 * c * (reading > bound)[:, None] + x + 0.5 * first.rows(first["a"]).write[0]
    torch.testing.assert_close(moved["layers.0"][0][1][0] - plain["layers.0"][0][1][0], wanted)
    assert 0 < int((reading > bound).sum()) < 4


def test_readings_of_several_banks_are_recorded_and_those_of_another_bank_held():
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7, 8]])
    first = two_directions(model)
    late = sl.ConceptBank.from_directions({"late": torch.linspace(-1, 1, 32)}, site="layers.1", base=model, name="other")

    def read(edits, **options):
        how = sl.steer(model, [first, late], edits, **options) if edits else nullcontext()
        with torch.no_grad(), how, sl.record(model, [first, late], ["a", "late"]) as tape:
            model(ids)
        return tape["a"][0][1], tape["late"][0][1]

    (a, z), (moved, other), (again, held) = read({}), read({"a": 2.0}), read({"a": 2.0}, do="hold", hold=["late"])
    rows = late.rows(late["late"])
    with torch.no_grad(), sl.record(model, ["layers.1"]) as tape:
        model(ids)
    torch.testing.assert_close(z, rows.reading(tape["layers.1"][0][1])[..., 0])
    torch.testing.assert_close(moved - a, torch.full_like(a, 2.0))
    torch.testing.assert_close(again, moved)
    torch.testing.assert_close(held, z, atol=1e-4, rtol=1e-4)
    assert (other - z).abs().max() > 1e-3


def test_a_name_that_two_banks_have_is_not_guessed():
    model = tiny("llama")
    banks = [two_directions(model), two_directions(model)]
    with pytest.raises(errors.UnknownConcept, match="has no concept 'a'; It has: directions 1/a, directions 1/b"):
        sl.steer(model, banks, {"a": 1.0})
    with pytest.raises(errors.UnknownConcept, match="no concept 'layers.0/0'"):
        sl.steer(model, banks, {"layers.0/0": 1.0})
    session = sl.steer(model, banks, {"directions 1/a": 1.0, "directions 2/a": 1.0})
    assert sl.steer(model, banks, {}).bank is session.bank  # joined once
    other = tiny("gpt2")
    with pytest.raises(errors.WrongModel, match="were made for different models"):
        sl.steer(model, [banks[0], two_directions(other)], {"a": 1.0})


@pytest.mark.parametrize(("change", "error", "words"), [
    (lambda b: b.merge(b), errors.BadBank, "both banks have 'concept 0', 'concept 1', 'concept 2'; give prefix="),
    (lambda b: b.merge(make(base=sl.BaseModel(id="org/two")), prefix="_"), errors.WrongModel, "id 'org/model' and 'org/two'"),
    (lambda b: b.merge(make(base=sl.BaseModel(fingerprint={"layers": 3})), prefix="_"), errors.WrongModel, "layers 2 and 3"),
    (lambda b: b.merge(make(width=16, base=b.base), prefix="_"), errors.WrongWidth, "has width 32 .* 16"),
    (lambda b: b.rename({"concept 1": "concept 2"}), errors.BadBank, "would have 'concept 2' twice"),
    (lambda b: b.rename({"concept 1": "layers.0@late#dir/2"}), errors.BadBank, "is how a row of bank 'made' is called"),
    (lambda b: b.rename({"concept 1": "a\nb"}), errors.BadBank, "expected a printable name"),
    (lambda b: b.rename({"concept 9": "b"}), errors.UnknownConcept, "no concept 'concept 9'"),
    (lambda b: b.add("concept 1", torch.ones(32), site="layers.0"), errors.BadBank, "has a concept 'concept 1' already"),
    (lambda b: b.add("new", torch.ones(31), site="layers.0"), errors.WrongWidth, "width"),
    (lambda b: b.select("concept 9"), errors.UnknownConcept, "no concept 'concept 9'"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(change, error, words):
    bank = make(base=sl.BaseModel(id="org/model", fingerprint={"layers": 2}))
    with pytest.raises(error, match=words):
        change(bank)
