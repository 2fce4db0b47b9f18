"""Training, attacking and judging cells, and keeping their results."""
