"""What is known before a run: models, families, machines, budgets."""
