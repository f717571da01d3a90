"""How a candidate is measured: evaluators, data, and the pools that run them."""
