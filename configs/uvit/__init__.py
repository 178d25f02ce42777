"""Configs of U-ViT (arXiv 2209.12152)."""
