"""How often something like it was seen: pseudo-counts of features behind one interface, one estimator per file."""
