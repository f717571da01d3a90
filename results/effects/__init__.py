"""What an ablation found: designs, predictions, statistics, one table of effects, and its words."""
