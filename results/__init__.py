"""What was measured: records, ledgers, leaderboards, statistics."""
