"""Planning: what a user chooses, the plan that comes of it, its forecast and its file."""
