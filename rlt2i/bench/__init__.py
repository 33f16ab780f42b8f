"""Which credit helps, where, and how sure are we: plans, paired runs, statistics, and what may be claimed."""
