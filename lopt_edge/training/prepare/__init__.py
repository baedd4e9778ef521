"""Everything that is read and decided before the first weight is loaded."""
