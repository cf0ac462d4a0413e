"""Small promises: help, completion, `python -m`, and files that must agree with each other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from commands import run

import mergekit_dam
from mergekit_dam.cli import main

ROOT = Path(__file__).resolve().parents[1]


def test_help_lists_the_commands_in_groups():
    shown = run("mergekit-dam", "--help").stdout
    on_models, on_files = shown.partition("\nCommands:")[2].split("Commands on coefficient files:")
    assert re.findall(r"^  (\w+)", on_models, re.MULTILINE)[:4] == ["check", "fit", "run", "merge"]
    listed = re.findall(r"^  (\w+)", on_models + on_files, re.MULTILINE)
    assert set(listed) == set(main.commands)


@pytest.mark.parametrize("command", ["fit", "run", "merge", "check", "convert"])
def test_help_groups_mergekits_flags_as_mergekit_does(command: str):
    shown = run("mergekit-dam", command, "--help").stdout
    stock = run("mergekit-yaml", "--help").stdout
    groups = re.findall(r"^(\w[\w ]+):$", stock, re.MULTILINE)
    assert {"Performance", "Dangerous Options"} <= set(groups)
    assert set(groups) <= set(re.findall(r"^(\w[\w ]+):$", shown, re.MULTILINE))


def test_every_option_has_help():
    for command in main.commands.values():
        assert command.help
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, (command.name, option.name)


def test_completion_as_the_readme_says():
    (line,) = re.findall(r'^eval "\$\((.+)\)"$', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line == "_MERGEKIT_DAM_COMPLETE=bash_source mergekit-dam"
    environment = {
        "_MERGEKIT_DAM_COMPLETE": "bash_complete",
        "COMP_WORDS": "mergekit-dam ins",
        "COMP_CWORD": "1",
    }
    script = Path(sys.executable).with_name("mergekit-dam")
    shown = subprocess.run(
        [script], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert shown.stdout == "plain,inspect\n"


def test_python_m_is_the_command():
    command = [sys.executable, "-m", "mergekit_dam", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert mergekit_dam.__version__ in shown


def test_pre_commit_and_constraints_name_one_ruff():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (pinned,) = re.findall(r"^ruff==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for repository in config["repos"]:
        for hook in repository["hooks"]:
            assert hook["additional_dependencies"] == [pinned]


def test_the_changelog_knows_the_version():
    assert mergekit_dam.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_contributing_sets_up_what_ci_sets_up():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    install = re.search(r"^pip install -e .*$", text, re.MULTILINE).group()
    assert install.removeprefix("pip install ") in (ROOT / ".ci" / "run").read_text()
    assert len(text.split()) < 500  # a page
