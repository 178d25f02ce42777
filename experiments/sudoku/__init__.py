"""A claim, its command and its measured table."""
