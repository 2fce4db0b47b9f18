"""Attacks of other libraries, called peers, and attacks held back from the suite, beside the suite itself."""

__all__: list[str] = []
