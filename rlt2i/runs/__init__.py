"""All that a run writes and reads: its directory, metrics, checkpoints, images and maps, and where they came from."""
