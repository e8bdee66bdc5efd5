"""Time: of an operator on a device, of a task, of a collective."""
