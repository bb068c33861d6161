"""Ways to find a lever, one a file: `fit(task) -> Lever`.

A new method is one file and its line here.
"""

from . import difference_of_means, distilled, gated, norm_matched, orthogonal, pca, probe, rank_one, several_layers

METHODS = {
    "difference-of-means": difference_of_means,
    "pca": pca,
    "probe": probe,
    "orthogonal": orthogonal,
    "norm-matched": norm_matched,
    "rank-one": rank_one,
    "distilled": distilled,
    "several-layers": several_layers,
    "gated": gated,
}
