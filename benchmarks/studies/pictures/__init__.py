"""The pictures of the documentation: what they show is measured, and drawn as SVG."""

__all__: list[str] = []
