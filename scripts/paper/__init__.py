"""The protocol of arXiv 2512.10720 on any text-to-image pipeline."""
