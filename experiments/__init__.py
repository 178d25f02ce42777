"""Claims and measurements: one folder a paper or topic, each shown again by one command."""
