"""The newcomer's commands are those that README and the documents say to type, none left out."""

import re
from pathlib import Path

import newcomer
import pytest
from support import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_command_of_the_documents_is_run_or_says_why_not() -> None:
    listed = set(newcomer.RUN) | set(newcomer.NOT_RUN)
    assert newcomer.written(DOCUMENTS) == listed
    assert not set(newcomer.RUN) & set(newcomer.NOT_RUN) and all(newcomer.NOT_RUN.values())
    assert len(newcomer.RUN) + len(newcomer.HELP) >= 20


def test_what_is_named_as_the_reason_exists() -> None:
    for reason in newcomer.NOT_RUN.values():
        for word in reason.replace(",", " ").replace(":", " ").split():
            if word.startswith("tests/"):
                assert list(ROOT.glob(word)), word


def test_commands_are_read_from_shell_and_from_prose(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(
        "Type `fpe one` or `fpe two --m\n16`, not `fpe.three` nor `fpe study <name>`.\n\n"
        "```sh\nfpe four  # in a checkout: make five\npip install 'six[seven]'\nfpe ten # slowly\n```\n\n"
        "```python\nfpe.eight  # as `fpe eleven` does\n```\n"
        "<!-- table: x -->\n| `fpe nine` |\n<!-- end -->\n"
    )
    assert newcomer.written([path]) == {
        "fpe one",
        "fpe two --m 16",
        "fpe four",
        "make five",
        "pip install 'six[seven]'",
        "fpe ten",
    }


QUESTIONS = {
    "how much memory?": r"How much memory\? \| [\d.]+ times the parent's",
    "which GPU?": r"NVIDIA GPUs of compute capability 8\.0",
    "my model?": r"find_pairs\(model\)` says w.*?\(docs/models\.md\)",
    "how fast?": r"What does it cost on a GPU\? \| a \d+ x \d+ layer with random masks takes",
    "why not just a wider layer?": r"a dense layer twice as wide.*?\+\d",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_readme_answers(question: str) -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(QUESTIONS[question], text, re.DOTALL)
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\(((?:docs/)?\w+\.md)\)", text))


def test_every_document_is_on_the_site() -> None:
    nav = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(nav) == pages | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"} and len(nav) == len(set(nav))
