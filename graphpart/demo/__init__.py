"""Models by name, generated data and a few training steps: what the command line needs besides planning."""
