"""Names from run folders as text: in plotly, in HTML and in JSON they must never become markup."""

import html
import json
import textwrap
import unicodedata

from gradlab.run import Run


def clean(name: object) -> str:
    """Make one printable line of any name.

    Args:
        name: A name from a run folder.

    Returns:
        The name with white space collapsed and what can't be printed (controls, direction
        overrides, lone surrogates) replaced.

    >>> clean("two" + chr(10) + "lines" + chr(0x202E))
    'two lines\ufffd'
    """
    line = " ".join(str(name).split())
    hidden = {"Cc", "Cf", "Cs"}
    return "".join("\ufffd" if unicodedata.category(c) in hidden else c for c in line)


def agent_names(run: Run, agents: int) -> list[str]:
    """Name the agents.

    Args:
        run: A run.
        agents: How many there are.

    Returns:
        The recorded names, or "agent 0" and so on where they are lost.
    """
    recorded = run.info.get("agent_names")
    known = [clean(name) for name in recorded] if isinstance(recorded, list) else []
    return [known[number] if number < len(known) else f"agent {number}" for number in range(agents)]


def elide(name: object, width: int = 28) -> str:
    """Shorten a long name in the middle, where run names differ least.

    Args:
        name: A name from a run folder.
        width: The most characters to keep.

    Returns:
        The cleaned name, not escaped.

    >>> elide("navigation-hypermarl-seed-3", 15)
    'navigat…-seed-3'
    """
    line = clean(name)
    if len(line) <= width:
        return line
    tail = (width - 1) // 2
    return f"{line[: width - 1 - tail]}…{line[-tail:]}"


def for_plotly(name: object, width: int = 200) -> str:
    """Escape a name for text that plotly draws.

    Plotly reads a few tags and decodes entities, so the ampersand has to be escaped first.

    Args:
        name: A name from a run folder.
        width: The most characters to keep.

    Returns:
        Text that plotly draws as the name itself.

    >>> for_plotly("<b>&lt;")
    '&lt;b&gt;&amp;lt;'
    """
    return html.escape(elide(name, width), quote=False)


def lines_for_plotly(sentence: str, width: int = 46) -> str:
    """Break a sentence into lines for an annotation, which plotly does not do itself.

    Args:
        sentence: Plain text.
        width: Characters per line.

    Returns:
        Escaped text with line breaks.
    """
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(sentence, width))


def for_html(text: object) -> str:
    """Escape text for an HTML element or a quoted attribute.

    Args:
        text: Plain text.

    Returns:
        Escaped text.
    """
    return html.escape(clean(text), quote=True)


def json_island(value: object) -> str:
    r"""Write JSON that can stand inside a script element.

    Args:
        value: What JSON can hold; NaN is refused, since browsers can't read it.

    Returns:
        ASCII text without any character that could end the element or start markup.

    >>> json_island("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
