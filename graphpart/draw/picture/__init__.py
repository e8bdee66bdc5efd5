"""Plans as pictures: graphs, folded until they can be read, laid out by Graphviz."""
