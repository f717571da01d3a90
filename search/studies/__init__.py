"""The registered studies: what is searched, how it is measured, what counts."""
