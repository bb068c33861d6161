"""With `[cli]` alone: every command that needs no model, and the name of the extra from those that do."""

import subprocess
import sys
import tempfile
from pathlib import Path

import steerlib

program = Path(steerlib.__file__).parents[4] / "bin" / "steerlib"


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    command = [sys.executable, "-I", "-W", "error", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


assert "concepts" in run("--help")
assert run("--version").startswith("steerlib ")
assert "scenes-32" in run("list")
assert "science" in run("concepts", "smollm2-135m-instruct", "science")
assert "What was measured" in run("info", "smollm2-135m-instruct")
assert "every file as it should be" in run("verify", "scenes-32")
assert all(name in run("examples") for name in ("image.py", "text.py", "train.py"))
assert "sl.steer(" in run("examples", "text")
assert "BadBank" in run("info", "no such bank", code=1)
with tempfile.TemporaryDirectory() as folder:
    run("graph", "smollm2-135m-latents", "--out", Path(folder) / "graph.html")
    run("migrate", "smollm2-135m-instruct", Path(folder) / "new")
    assert {path.name for path in Path(folder).iterdir()} == {"graph.html", "new"}
assert "steerlib[diffusers]" in run("steer", "scenes-32", "a red square", "-e", "blue=1", code=1)
assert "steerlib[transformers]" in run("steer", "smollm2-135m-instruct", "Hello", "-e", "science=1", code=1)
assert "MissingExtra" in run("eval", "smollm2-135m-instruct", "--quick", code=1)
