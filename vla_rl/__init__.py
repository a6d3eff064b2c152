"""Robot learning from demonstrations to an evaluated policy; see README.md for the map of the code."""
