"""The environment that the page on environments shows."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


def example():
    """Source of the module `posts`."""
    blocks = PAGE.read_text().split("```python\n")[1:]
    (found,) = [block.partition("```")[0] for block in blocks if "class Posts" in block]
    return found
