"""Experiments as `ml_collections` configs: `get_config()` in each file."""
