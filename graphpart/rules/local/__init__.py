"""Local calls: what an operator's arguments are on one tile."""
