import re
import shlex
from pathlib import Path

import pytest

from gradlab.cli import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(page, "python")), {"__name__": page.stem})


def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [
        line
        for block in blocks(ROOT / "README.md", "sh")
        for line in block.splitlines()
        if line.startswith("gradlab ")
    ]
    assert len(commands) >= 3
    for command in commands:
        # the shortest training stands in for the one that is shown; all else is as it stands
        words = shlex.split(command, comments=True)[1:]
        assert run([*words, "--frames", "4096"] if words[0] == "train" else words) == 0, command


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"make ([\w-]+)", (ROOT / "README.md").read_text())
    assert {"demo", "test"} <= set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
