"""The kinds of models: one file for each, found by the registry's scan."""
