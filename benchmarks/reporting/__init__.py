"""Pages, tables and figures from results alone."""
