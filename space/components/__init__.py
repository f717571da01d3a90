"""The registered parts of a Vision Transformer: one file per idea, found by the registry's scan."""
