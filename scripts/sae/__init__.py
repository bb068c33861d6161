"""Other trainers of sparse autoencoders, at equal settings."""
