"""From recorded runs to plotly figures and one self-contained HTML page."""

from dashboards.page import page_html, write_page

__all__ = ["page_html", "write_page"]
