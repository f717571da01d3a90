"""The registered evaluators: plain functions that need neither Ray nor Optuna nor MLflow."""
