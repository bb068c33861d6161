"""With the core's dependencies alone: import, open and search a shipped bank, steer any torch module, save and verify."""

import inspect
import sys
import tempfile
from pathlib import Path

import steerlib as sl

assert "torch" not in sys.modules and sl.__version__[0].isdigit()

import torch  # noqa: E402
from torch import nn  # noqa: E402

found = dict(inspect.getmembers(sl))  # what help(sl) and editors do: no public name needs more than the core
assert {*sl.__all__, "errors"} <= found.keys()
bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
bank.verify()
assert bank.find("science")[0].name == "science"
assert {found.name for found in sl.list_banks(local_files_only=True)} >= {"smollm2-135m-instruct", "scenes-32"}


class Block(nn.Module):
    """Passes its input on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


model = nn.Sequential(Block(), Block())
direction = torch.tensor([3.0, 4.0])
made = sl.ConceptBank.from_directions({"a": direction}, site="0", base=model)
x = torch.zeros(1, 3, 2)
with sl.steer(model, made, {"a": 2.0}), torch.no_grad():
    assert torch.equal(model(x), 2 * direction.expand(1, 3, 2))
assert torch.equal(model(x), x)
with tempfile.TemporaryDirectory() as folder:
    made.save_pretrained(folder)
    opened = sl.ConceptBank.from_pretrained(folder)
    opened.verify()
    assert list(opened.concepts) == ["a"]


def told(act, extra: str) -> None:
    """What needs an extra says its name."""
    try:
        act()
    except sl.errors.MissingExtra as error:
        assert f"pip install 'steerlib[{extra}]'" in str(error), error
    else:
        raise AssertionError(f"expected to be told of the extra {extra}")


def run_commands() -> None:
    import steerlib.cli  # noqa: F401


def find_graphs() -> None:
    import steerlib.training.discover.text_graph  # noqa: F401


told(lambda: sl.load("org/model"), "transformers")
told(lambda: sl.load(f"{sl.ConceptBank.from_pretrained('scenes-32').folder}/pipeline"), "diffusers")
told(lambda: made.save_pretrained(Path(folder) / "signed", key=Path("key.pem")), "sign")
told(find_graphs, "train")
told(run_commands, "cli")
