"""Speed as the ratio of two ways to do the same, measured side by side. Each module makes some rows of the table."""
