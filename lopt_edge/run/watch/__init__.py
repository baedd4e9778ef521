"""What is measured while a step runs."""
