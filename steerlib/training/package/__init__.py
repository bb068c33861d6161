"""Stage 6: encoders, labels and figures as a bank with a card."""
