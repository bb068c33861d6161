"""With `[graph]`: two causes that a child depends on are told from a third that it does not, by tests of independence."""

import numpy as np

from steerlib.training.discover.independence import fisher_z, parents_of

random = np.random.default_rng(0)
causes = random.standard_normal((2000, 3))
child = causes[:, :2] @ np.array([1.0, -1.0]) + 0.1 * random.standard_normal(2000)
data = np.hstack([causes, child[:, None]])
assert parents_of(data, [0, 1, 2], 3, fisher_z()) == [0, 1]
