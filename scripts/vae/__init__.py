"""Six kinds of autoencoder on five data sets whose factors are known, studied by intervention (arXiv 2505.03530)."""
