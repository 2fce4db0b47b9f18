"""Images of the paper's data sets."""
