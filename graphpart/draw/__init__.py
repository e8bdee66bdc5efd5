"""Pictures and tables of graphs and plans."""
