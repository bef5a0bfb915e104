"""The dashboard as a server: the same panels as on the page, kept up with trainings that go on."""

from dashboards.live.serve import serve

__all__ = ["serve"]
