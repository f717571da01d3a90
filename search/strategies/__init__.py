"""The registered strategies: what to try next."""
