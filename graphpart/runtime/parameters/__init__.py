"""A model's parameters, homes cut over devices, and their gradients."""
