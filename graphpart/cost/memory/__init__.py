"""Memory: what devices hold, what backward passes keep, what is saved by running it again."""
