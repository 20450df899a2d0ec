"""The newcomer's commands are those that README and the documents say to type, none left out."""

from pathlib import Path

import newcomer
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
        "```sh\nfpe four  # in a checkout: make five\npip install 'six[seven]'\n```\n\n```python\nfpe.eight\n```\n"
        "<!-- table: x -->\n| `fpe nine` |\n<!-- end -->\n"
    )
    assert newcomer.written([path]) == {
        "fpe one",
        "fpe two --m 16",
        "fpe four",
        "make five",
        "pip install 'six[seven]'",
    }
