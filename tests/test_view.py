"""A bank's graph as a page and in the formats of others; the page is clicked through in a browser where there is one."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree as xml

import pytest
import torch
from PIL import Image

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import Directions
from steerlib.errors import BadBank
from steerlib.graph.exports import circuit_tracer, graphml, levels
from steerlib.graph.page import THUMBNAIL, facts, page

LEVELS = ("layers.3", "layers.10", "layers.21")
EVIL = "</script><script>document.title='broken'</script>"
MEASURED = {"tau": 1.5, "tau_lo": 1.25, "tau_hi": 1.75, "necessity": 0.75, "sufficiency": 0.5, "p_adj": 2**-10, "n_verify": 64}


@pytest.fixture
def bank():
    """Three levels whose names do not sort as they count, edges of all kinds, and a label that would like to be markup."""
    concepts = [
        sl.Concept(
            name=f"{level} {i}", encoder=level, index=i, label=f"label {k}{i}", examples=(f"context {k}{i}",), useful=2.0
        )
        for k, level in enumerate(LEVELS)
        for i in range(3)
    ]
    concepts[0] = replace(concepts[0], label=EVIL)
    edges = [
        sl.Edge(src="layers.3 0", dst="layers.10 1", weight=1.5, evidence="verified", **MEASURED),
        sl.Edge(src="layers.10 1", dst="layers.21 2", weight=-0.25, evidence="randomised"),
        sl.Edge(src="layers.21 0", dst="layers.3 1", weight=0.5, relation="selection", evidence="observed", necessity=0.875),
    ]
    encoders = {level: Directions(torch.eye(3)) for level in LEVELS}
    sites = {level: SiteFacts(width=3) for level in LEVELS}
    return sl.ConceptBank("toy", concepts, encoders, base=sl.BaseModel(id="a/b"), sites=sites, graph=sl.CausalGraph(edges))


@pytest.fixture
def pictured(bank):
    """The same, with a picture of one concept beside one of the card."""
    file = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(file, "PNG")
    return bank.with_concepts(pictures={THUMBNAIL.format("layers.3 0"): file.getvalue(), "card.png": b"of the card"})


def test_levels_are_in_the_order_of_their_causes(bank):
    assert levels(bank) == list(LEVELS)


def test_circuit_tracer_has_every_node_and_link_by_the_ids_it_expects(bank):
    made = json.loads(circuit_tracer(bank))
    nodes = {node["node_id"]: node for node in made["nodes"]}
    assert set(nodes) == {"0_0_0", "0_1_0", "1_1_0", "2_0_0", "2_2_0"}
    for id, node in nodes.items():
        layer, index = map(int, id.split("_")[:2])
        assert node["layer"] == str(layer) and node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    links = {(link["source"], link["target"]): link for link in made["links"]}
    assert links["0_0_0", "1_1_0"]["weight"] == 1.5 and links["0_0_0", "1_1_0"]["tau_hi"] == 1.75
    assert links["2_0_0", "0_1_0"]["relation"] == "selection" and "tau" not in links["2_0_0", "0_1_0"]


def test_graphml_is_read_by_another_library(bank, tmp_path):
    networkx = pytest.importorskip("networkx", reason="needs networkx, which comes with torch")
    (tmp_path / "toy.graphml").write_text(graphml(bank), encoding="utf-8")
    graph = networkx.read_graphml(tmp_path / "toy.graphml")
    assert graph.nodes["layers.3 0"]["label"] == EVIL and graph.nodes["layers.21 2"]["index"] == 2
    found = graph.edges["layers.3 0", "layers.10 1"]
    assert {name: found[name] for name in MEASURED} == MEASURED and found["evidence"] == "verified"
    assert graph.number_of_edges() == 3 and graph.is_directed()


def test_graphml_is_well_formed_and_declares_its_keys(bank):
    root = xml.fromstring(graphml(bank))
    space = "{http://graphml.graphdrawing.org/xmlns}"
    declared = {key.get("id") for key in root.findall(f"{space}key")}
    used = {data.get("key") for data in root.iter(f"{space}data")}
    assert used == declared and "edge.tau" in declared


def test_the_page_asks_for_nothing_and_takes_nothing_as_markup(bank):
    text = page(bank)
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(|innerHTML""", text)
    assert "default-src 'none'" in text and EVIL not in text and text.count("<script") == 2
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert data["levels"] == list(LEVELS) and data["concepts"][0]["label"] == EVIL and len(data["edges"]) == 3


def test_a_concept_comes_with_its_picture(pictured):
    found = {concept["name"]: base64.b64decode(concept["picture"]) for concept in facts(pictured)["concepts"]}
    assert found.pop("layers.3 0") == pictured.pictures[THUMBNAIL.format("layers.3 0")] and not any(found.values())


def test_the_page_is_the_same_for_the_same_bank(bank, tmp_path):
    again = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "toy"))
    assert page(again) == page(bank)


def test_a_bank_without_a_graph_says_so(bank):
    with pytest.raises(BadBank, match="no graph"):
        page(bank.with_concepts(list(bank.concepts.values()), graph=sl.CausalGraph()))


@pytest.mark.parametrize("suffix", ["html", "json", "graphml"])
def test_the_command_writes_what_the_ending_asks_for(bank, tmp_path, suffix):
    folder, out = bank.save_pretrained(tmp_path / "toy"), tmp_path / f"toy.{suffix}"
    done = subprocess.run(
        [sys.executable, "-m", "steerlib", "graph", str(folder), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "3 edges" in done.stdout
    again = sl.ConceptBank.from_pretrained(folder)
    assert out.read_text(encoding="utf-8") == {"html": page, "json": circuit_tracer, "graphml": graphml}[suffix](again)


def test_the_page_can_be_clicked_through(pictured, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a browser of its own")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the path")
    path = tmp_path / "toy.html"
    path.write_text(page(pictured), encoding="utf-8")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        tab, wrong = context.new_page(), []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.goto(path.as_uri())
        assert tab.title() == "toy: causal graph" and tab.locator(".node").count() == 5 and tab.locator(".edge").count() >= 3
        tab.locator('[data-name="layers.3 0"]').click()
        said = tab.locator("#about").inner_text()
        assert tab.locator(".node image").count() == 1
        assert tab.locator("#about img").evaluate("img => img.decode().then(() => img.naturalWidth)") == 8
        assert EVIL in said and "context 00" in said and "layers.10 1" in said and "+1.50" in said
        assert tab.locator(".node.dim").count() == 2  # a part and its whole, which it does not reach
        tab.locator("#about button", has_text="layers.10 1").click()
        said = tab.locator("#about").inner_text()
        assert "64 contexts" in said and "+1.25 to +1.75" in said and "75 %" in said and "ablated alone" in said
        tab.keyboard.press("Escape")
        tab.locator("#kinds input[name=randomised]").uncheck()
        assert tab.locator("#graph .edge").count() == 2 and tab.locator(".node").count() == 4
        tab.locator("#least").evaluate("slider => { slider.value = 0.9; slider.dispatchEvent(new Event('input')); }")
        assert tab.locator("#graph .edge").count() == 1
        tab.locator("#search").fill("layers.3 0")
        tab.locator("#search").press("Enter")
        assert "context 00" in tab.locator("#about").inner_text()
        assert wrong == []
        browser.close()
