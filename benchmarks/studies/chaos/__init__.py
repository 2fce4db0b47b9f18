"""Damage files, kill writers, share guards between threads and attack the service, and count what goes unnoticed."""

__all__: list[str] = []
