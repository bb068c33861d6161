"""Train a bank: one file a stage."""
