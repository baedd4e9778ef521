"""From settings to the planner's question."""
