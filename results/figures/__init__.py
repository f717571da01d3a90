"""Figures of a study: PNG for papers and README, interactive ones for pages."""
