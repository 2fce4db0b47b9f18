"""What is run: experiments as data, their cells, and the kinds of attacks."""
