"""The families of named networks: one file for each, found by the registry's scan."""
