"""The main job end to end: three model families trained, sampled and judged on real digits."""
