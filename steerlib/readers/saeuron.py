"""SAeUron (Cywinski and Deja 2025, 2501.18052): sparsify's files with settings of their own, untested on releases.

Trained to keep k latents of a token on average or of an image, read by the k largest of each token; `input_unit_norm` is a
layer norm. Folders have the paths of modules, from the pipeline.
"""

from collections.abc import Iterable
from pathlib import Path

from ..encoders import TopK
from . import files, sparsify
from .foreign import Foreign, Found
from .table import Table

FILES, OF = sparsify.FILES, "sparsify"
OWN = {"batch_topk", "sample_topk", "input_unit_norm"}
"""Settings that files of sparsify do not have."""
SETTINGS = Table(
    read="k num_latents d_in input_unit_norm",
    aside="expansion_factor normalize_decoder multi_topk batch_topk sample_topk",
    only={"activation": ("topk",), "signed": (False, None), "transcode": (False, None), "skip_connection": (False, None)},
)


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return [folder for folder in files.units(path, *FILES) if OWN & files.settings(folder / FILES[0]).keys()]


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder. `ignore` names settings that this reader does not know and that readings do not depend on."""
    return Foreign(found=[_found(folder, tuple(ignore)) for folder in units(path)])


def _found(folder: Path, ignore: tuple[str, ...]) -> Found:
    cfg = files.settings(folder / FILES[0])
    SETTINGS.check(folder, cfg, ignore)
    norm = "layer" if cfg.get("input_unit_norm") else ""
    encoder = TopK(**sparsify.weights(folder, cfg, ignore), k=files.whole(cfg, "k"), centred=True, norm=norm)
    return Found(encoder=encoder, hook=folder.resolve().name)
