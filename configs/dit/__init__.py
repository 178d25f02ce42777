"""Configs of DiT (arXiv 2212.09748)."""
