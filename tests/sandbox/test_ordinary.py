"""Sixteen ordinary programs give what unmodified Python gives, plus the echo; and the echo's rules.

Rewriting the last line into print(...) breaks eleven of them.
"""

import subprocess
import sys

import pytest

# (program, what the echo adds to standard output)
PROGRAMS = [
    ("x=3", ""),
    ("x=3  # done", ""),
    ("for i in range(3):\n    print(i)", ""),
    ("if True:\n    print(1)\nelse:\n    print(2)", ""),
    ('if __name__ == "__main__":\n    print(1)', ""),
    ("print(\n    1,\n    2)", ""),
    ("def f():\n    return 1\nprint(f())", ""),
    ("try:\n    print(1/1)\nexcept ZeroDivisionError:\n    print(0)", ""),
    ("x = 2\nimport math", ""),
    ("s = 0\nfor i in range(4):\n    s += i", ""),
    ('x = 1\n"""a text\nthat ends it"""', "'a text\\nthat ends it'\n"),
    ("assert 1 == 1", ""),
    ("a=1; print(a)", ""),
    ('with open("f","w") as f:\n    f.write("x")', ""),
    ('print("a", end="")', ""),
    ("sum(range(5))", "10\n"),
]


@pytest.mark.parametrize(("program", "echo"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_behaves_as_in_python_plus_the_echo(program, echo, sandbox, tmp_path):
    path = tmp_path / "main.py"
    path.write_text(program)
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    result = sandbox.run(program)
    expected = (plain.returncode, plain.stdout + echo, plain.stderr)
    assert (result.return_code, result.stdout, result.stderr) == expected
    assert result.outcome == ("ok" if plain.returncode == 0 else "user_error")


@pytest.mark.parametrize(
    ("program", "stdout"),
    [
        ("None", ""),
        ("x = 5\nx", "5\n"),
        ("'a' 'b'", "'ab'\n"),
        ("5;", "5\n"),
        ("5\n# comment\n\n", "5\n"),
        ("1\n2", "2\n"),
        ("if 1:\n  2", ""),
        ("(yes := 3)", "3\n"),
        ("from __future__ import annotations\n7", "7\n"),
        ("import sys\nsys.displayhook = lambda v: print('shown', v)\n3", "shown 3\n"),
        ("lambda: 0\nprint('x')\n[print(i) for i in range(2)]", "x\n0\n1\n[None, None]\n"),
    ],
)
def test_only_the_value_of_a_last_expression_is_echoed(program, stdout, sandbox):
    result = sandbox.run(program)
    assert (result.outcome, result.stdout, result.stderr) == ("ok", stdout, "")


def test_echo_can_be_off(sandbox):
    assert sandbox.run("5", echo=False).stdout == ""


@pytest.mark.parametrize(
    ("program", "last_line"),
    [
        ("def f():\n    return g()\nf()", "NameError: name 'g' is not defined"),
        ("raise ValueError('no')", "ValueError: no"),
        (
            "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError(1) from e",
            "KeyError: 1",
        ),
        ("raise ExceptionGroup('g', [ValueError(1)])", ""),
        ("x = (1,\n", "SyntaxError: '(' was never closed"),
        ("  x = 1", "IndentationError: unexpected indent"),
        ("exec('1 +')", "SyntaxError: invalid syntax"),
    ],
)
def test_traceback_is_pythons_own(program, last_line, sandbox, tmp_path):
    """The same text as `python main.py`, where the file is named without its folder."""
    path = tmp_path / "main.py"
    path.write_text(program)
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    result = sandbox.run(program)
    assert result.stderr == plain.stderr.replace(f"{tmp_path}/", "")
    assert result.stderr.rstrip("\n").endswith(last_line)
    assert result.return_code == plain.returncode == 1


def test_same_program_gives_the_same_bytes(sandbox):
    program = "import os\nprint(hash('a'), {'b', 'a', 'c'}, os.getcwd())\n1/0"
    assert sandbox.run(program).observation_text() == sandbox.run(program).observation_text()


def test_runs_share_nothing(sandbox):
    first = sandbox.run("import builtins, os\nbuiltins.x = 5\nopen('f','w').write('1')")
    second = sandbox.run("import builtins, os\nprint(hasattr(builtins, 'x'), os.listdir('.'))")
    assert first.outcome == "ok"
    assert second.stdout == "False ['main.py']\n"


def test_random_numbers_differ_between_runs(sandbox):
    program = "import random; print(random.random())"
    assert len({sandbox.run(program).stdout for _ in range(5)}) == 5
