"""Options of all commands: one spelling for one meaning, one meaning for one spelling, one form for what is wrong."""

import re
from collections import defaultdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_terminal import ALL

from fpe.bench.cli import cli
from fpe.bench.gpu.cli import main as gpu
from fpe.bench.gpu.cli import parser

OWN = {"--quick", "--all", "--output"}
"""Options that say in each command what they do there; ``study features`` writes a file, the others into a folder."""


def command_of(words: tuple[str, ...]) -> click.Command:
    command: click.Command | None = cli
    for word in words:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    return command


OPTIONS = [(words, option) for words in ALL for option in command_of(words).params if isinstance(option, click.Option)]


def meaning(option: click.Option) -> str:
    """The first clause of what it says."""
    return re.split(r"[.,;:] |[.,;:]$|  \[", option.help or "")[0]


def test_every_option_says_what_it_is() -> None:
    assert not [(words, option.opts) for words, option in OPTIONS if not meaning(option)]


def test_a_spelling_has_one_meaning_and_a_meaning_one_spelling() -> None:
    meanings: dict[str, set] = defaultdict(set)
    spellings: dict[str, set] = defaultdict(set)
    for _, option in OPTIONS:
        name = option.opts[0]
        if name not in OWN:
            meanings[name].add((meaning(option), option.metavar, option.nargs))
            spellings[meaning(option)].add(name)
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}
    assert {what: found for what, found in spellings.items() if len(found) > 1} == {}
    assert all(not name.endswith("s") or name[:-1] not in meanings for name in meanings)


def test_a_number_has_the_same_range_everywhere() -> None:
    ranges: dict[str, set] = defaultdict(set)
    for _, option in OPTIONS:
        if isinstance(option.type, (click.IntRange, click.FloatRange)):
            ranges[option.opts[0]].add((option.type.min, option.type.max))
    assert ranges.pop("--alpha") == {(1, 254), (2, 254)}  # 1, where the parent itself can be shown
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


def test_options_of_fpe_gpu_are_spelt_as_the_others() -> None:
    """It has a parser of its own, because a GPU machine may lack the one of the others."""
    own = {name for action in parser()._actions for name in action.option_strings}
    others = {name for _, option in OPTIONS for name in option.opts}
    assert {"--minutes", "--json", "--csv", "--provider", "--output", "--jobs", "--dry-run"} <= own & others
    assert not {f"{name}s" for name in others} & own


FREE = {"--kernels", "--model", "--pretrained", "--output", "--json", "--csv"}
"""Any text is one of the first; the others take a folder, whose test is in test_cli.py, or nothing."""


def refusable() -> dict[tuple, tuple[tuple[str, ...], click.Option]]:
    """A command for each option and kind of its values."""
    found: dict[tuple, tuple[tuple[str, ...], click.Option]] = {}
    for words, option in OPTIONS:
        if option.opts[0] not in FREE and not option.is_flag:
            found.setdefault((option.opts[0], type(option.type)), (words, option))
    return found


@pytest.mark.parametrize(
    ("words", "option"), refusable().values(), ids=lambda v: v.opts[0] if hasattr(v, "opts") else ""
)
def test_a_bad_value_is_refused_with_the_option_s_name(
    words: tuple[str, ...], option: click.Option, tmp_path: Path
) -> None:
    name = option.opts[0]
    output = ["--output", str(tmp_path)] if name == "--data" else []
    done = CliRunner().invoke(cli, [*words, name, *["no-such"] * option.nargs, *output])
    assert done.exit_code == 2, done.output
    assert f"Error: Invalid value for '{name}': " in done.output


@pytest.mark.parametrize("words", [words for words, option in OPTIONS if option.opts[0] == "--data"], ids=" ".join)
def test_data_that_are_not_there_are_refused_by_name(words: tuple[str, ...], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, [*words, "--data", "no-such", "--output", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert "Error: Invalid value for '--data': there is no" in done.output and "no-such" in done.output


FRACTIONS = {option.opts[0]: words for words, option in OPTIONS if isinstance(option.type, click.FloatRange)}


@pytest.mark.parametrize(("name", "words"), FRACTIONS.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_nan_is_in_no_range(name: str, words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*words, name, "nan"])
    assert done.exit_code == 2 and f"Error: Invalid value for '{name}': 'nan' is not a number" in done.output


@pytest.mark.parametrize("value", ["-1", "0", "nan", "some"])
@pytest.mark.parametrize("name", ["--minutes", "--jobs"])
def test_fpe_gpu_refuses_in_the_same_form(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu(["--plan", name, value])
    assert caught.value.code == 2
    assert f"Error: Invalid value for '{name}': expected a positive number" in capsys.readouterr().err


def test_fpe_gpu_refuses_an_unknown_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu(["--dry-run", "--provider", "magic"]) == 1
    assert "Error: provider must be one of" in capsys.readouterr().err


def test_execute_says_that_a_quick_run_has_no_such_case(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["lab", "execute", "--quick", "--op", "grad_t", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "Error: Invalid value for '--op': --quick has no case of grad_t" in done.output
