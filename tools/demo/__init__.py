"""The parts of ``make demo``: real faces, baselines, the comparison, the report; and the miniature IJB-shaped set."""
