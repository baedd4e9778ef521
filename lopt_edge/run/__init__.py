"""What runs: loading, losses, the executor of a plan, the optimizer, the meter. Decides nothing; see plan/."""
