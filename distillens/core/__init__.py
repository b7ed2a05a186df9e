"""Values and contracts: level 0, imports nothing else of the package."""
