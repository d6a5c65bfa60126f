"""From importers' operator chains to the integer graph: one description, an adapter for each IR."""
