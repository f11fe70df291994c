"""Shell completion: the scripts, and what the shell is told while a line is typed. Pressing Tab loads no library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.places import ROOT

PROGRAM = "import sys; sys.argv[0] = 'vlmtok'; from vlmtok.cli import main; main()"


def vlmtok(tmp_path, *words, **environment):
    """The program, as a shell runs it under its name."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "HOME": str(tmp_path), **environment}
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def named(tmp_path, *words):
    """The same where the shell is named, since what runs the tests is no shell of the user's."""
    return vlmtok(tmp_path, *words, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")


@pytest.mark.parametrize(
    "shell, line",
    [
        ("bash", "complete -o default -F _vlmtok_completion vlmtok"),
        ("zsh", "#compdef vlmtok"),
        ("fish", "complete --command vlmtok --no-files"),
        ("powershell", "Register-ArgumentCompleter -Native -CommandName vlmtok"),
    ],
)
def test_the_script_of_a_shell(tmp_path, shell, line):
    done = named(tmp_path, "--show-completion", shell)
    assert done.returncode == 0 and done.stderr == ""
    assert line in done.stdout and "_VLMTOK_COMPLETE" in done.stdout


def test_the_script_of_bash_completes(tmp_path):
    script = named(tmp_path, "--show-completion", "bash").stdout
    program = tmp_path / "vlmtok"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    program.chmod(0o755)
    ask = 'COMP_WORDS=(vlmtok e); COMP_CWORD=1; _vlmtok_completion vlmtok; echo "${COMPREPLY[@]}"'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], env=env, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.split()) == ["estimate", "eval"], done.stderr


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("vlmtok ", ["bench", "doctor", "estimate", "eval", "recommend", "run", "list", "show"]),
        ("vlmtok d", ["doctor"]),
        ("vlmtok estimate --con", ["--convention"]),
        ("vlmtok run --max", ["--max-new-tokens"]),
    ],
)
def test_what_is_offered(tmp_path, typed, offered):
    words = len(typed.split(" ")) - 1
    done = vlmtok(tmp_path, _VLMTOK_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(words))
    assert sorted(done.stdout.split()) == sorted(offered), done.stderr


def test_a_shell_that_is_not_known_is_one_line(tmp_path):
    done = named(tmp_path, "--show-completion", "nosuch")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("vlmtok: ") and done.stderr.count("\n") == 1 and "zsh" in done.stderr


def test_installing_writes_below_the_home_folder_alone(tmp_path):
    done = named(tmp_path, "--install-completion", "bash")
    assert done.returncode == 0, done.stderr
    assert "vlmtok.sh" in (tmp_path / ".bashrc").read_text()
    assert (tmp_path / ".bash_completions" / "vlmtok.sh").exists()


def test_completing_loads_no_library(tmp_path):
    check = (
        "import atexit, sys; sys.argv[0] = 'vlmtok'; "
        "atexit.register(lambda: print(sorted({'torch', 'timm'} & set(sys.modules)), file=sys.stderr)); "
        "from vlmtok.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "_VLMTOK_COMPLETE": "complete_bash"}
    env |= {"COMP_WORDS": "vlmtok e", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.split()) == ["estimate", "eval"] and done.stderr.strip() == "[]"
