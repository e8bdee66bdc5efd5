"""Which axes operators are cut along: candidates, prices, and the choice."""
