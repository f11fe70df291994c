"""What a command refuses or notes, it says in the words of the command line: options, not arguments of functions."""

from __future__ import annotations

import dataclasses
import os
import warnings

import pytest
import typer.main
from typer.testing import CliRunner

from vlmtok import cli
from vlmtok.cli import console, words
from vlmtok.core.registry import list_methods, method_class
from vlmtok.errors import ParameterError, VlmtokError, VlmtokWarning
from vlmtok.forecast import estimate as estimating
from vlmtok.lab import compare as comparing

COMMANDS = typer.main.get_command(cli.app).commands
OPTIONS = [(name, key) for name, command in COMMANDS.items() for key in words.options(command)]


@pytest.fixture
def vlmtok_(monkeypatch, tmp_path):
    """Runs the command; gives what it printed and its exit code."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return lambda *typed: CliRunner().invoke(cli.app, [str(word) for word in typed])


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("estimate llava-1.5-7b --visual-tokens 7 --crops 2", "--visual-tokens 7 cannot be shared by 2"),
        ("estimate clip-vit-b-16 --text-tokens 1", "estimate: --text-tokens 1 must be an integer in [2, inf]"),
        ("run --model timm:resnet18 --random", "may run with --adapter 'generic-vlm'"),
        ("run --method fastv:keeep=0.5", "fastv has no parameter 'keeep'; did you mean 'keep'?"),
        ("run --method pitome:r=8", "PiToMe: ratio=8 must be a number in [0, 1] (r stands for ratio)"),
        ("run --method pyramid-drop", "did you mean 'pyramiddrop'?"),
    ],
)
def test_refusals_name_options(vlmtok_, typed, says):
    result = vlmtok_(*typed.split())
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_every_option_of_every_command_has_its_word(name, key):
    words.enter(COMMANDS[name])
    typed, alone = words.options(COMMANDS[name])[key]
    assert typed.startswith("--")
    if alone:
        assert words.in_options(f"by: {key}=True is not possible") == f"by: {typed} is not possible"
        return
    assert words.in_options(f"by: {key}=3 is not possible") == f"by: {typed} 3 is not possible"
    assert words.in_options(f"nobody knows; pass {key}=") == f"nobody knows; pass {typed}"
    assert words.in_options(f"pass {key}='x'; or not") == f"pass {typed} 'x'; or not"
    # Settings of spec strings and fields of objects are no options.
    for other in (f"todre:{key}=3", f"config.{key}=3", f"pre_{key}=3"):
        assert words.in_options(other) == other


def test_words_stay_that_are_no_arguments():
    words.enter(COMMANDS["run"])
    assert words.in_options("a model, its prompt and a method") == "a model, its prompt and a method"
    assert words.in_options("max_new_tokens must be 1") == "--max-new-tokens must be 1"
    assert words.in_options("visual_tokens=3") == "visual_tokens=3"  # which `run` does not take


def test_no_method_has_a_parameter_of_an_options_name():
    """Otherwise a method's refusal would name the option."""
    options = {key for _, key in OPTIONS} | {key.replace("_", "-") for _, key in OPTIONS}
    for name in list_methods():
        cls = method_class(name)
        own = {item.name for item in dataclasses.fields(cls)} | {alias.name for alias in cls.aliases}
        assert not own & options, name


def test_an_error_from_below_is_said_in_options(vlmtok_, monkeypatch):
    def refuse(*given, **more):
        raise ParameterError("sweep: max_new_tokens=0 and rounds=9 are not possible; pass adapter=")

    monkeypatch.setattr(comparing, "compare", refuse)
    result = vlmtok_("run")
    assert result.exit_code == 2
    assert "sweep: --max-new-tokens 0 and --rounds 9 are not possible; pass --adapter" in result.stderr


def test_a_warning_is_said_in_options(vlmtok_, monkeypatch):
    real = estimating.subject_of

    def warn(*given):
        warnings.warn("visual_tokens=576 is a guess; pass visual_tokens=", VlmtokWarning, stacklevel=1)
        return real(*given)

    monkeypatch.setattr(estimating, "subject_of", warn)
    result = vlmtok_("estimate")
    assert result.exit_code == 0
    assert "vlmtok: note: --visual-tokens 576 is a guess; pass --visual-tokens\n" in result.stderr


def test_the_type_of_an_error_and_errors_of_two_arguments_stay():
    words.enter(COMMANDS["run"])
    problem = ParameterError("rounds=0")
    words.say_in_options(problem)
    assert type(problem) is ParameterError and isinstance(problem, VlmtokError) and str(problem) == "--rounds 0"
    two = OSError(2, "rounds=0", os.devnull)
    words.say_in_options(two)
    assert two.strerror == "rounds=0"
    assert console.in_options is words.in_options
