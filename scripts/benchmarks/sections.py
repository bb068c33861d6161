"""Parts of a README that a command writes: what stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""

import re
from collections.abc import Iterable
from pathlib import Path


def _marks(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end: {re.escape(name)} -->)", re.DOTALL)


def put(readmes: Iterable[Path], name: str, content: str) -> None:
    """Write a part anew, in the one README that has it; raises `ValueError` if none or several have."""
    have = {path: path.read_text(encoding="utf-8") for path in readmes if path.is_file()}
    homes = [path for path, text in have.items() if _marks(name).search(text)]
    if len(homes) != 1:
        raise ValueError(f"expected marks of {name!r} in one README, found them in {[path.name for path in homes]}")
    homes[0].write_text(_marks(name).sub(lambda m: f"{m[1]}{content}\n{m[2]}", have[homes[0]]), encoding="utf-8")
