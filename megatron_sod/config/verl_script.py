"""The key=value words of a launch script, with its variables resolved. Nothing is executed.

Understood: assignments (with `export`), quotes, line continuations, comments, $X, ${X},
${X:-default}, $((arithmetic)). Command substitution, arrays and control flow are not: what depends
on them stays as written and is reported.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_ASSIGNMENT = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*=")
_OVERRIDE = re.compile(r"^(?:--)?[+~]{0,2}[A-Za-z_][\w.\-/@]*=")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENDS = (";", "\n")
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,  # the shell divides whole numbers
    ast.Mod: operator.mod,
}


@dataclass
class Script:
    """What a script would pass to its command."""

    overrides: list[str] = field(default_factory=list)  # in order, "a.b=c"
    unresolved: list[str] = field(default_factory=list)  # overrides that still hold a $


def read_script(text: str, variables: Mapping[str, str] | None = None) -> Script:
    """Overrides of the command in `text`, or of a bare list of overrides.

    Args:
        variables: values that the environment would give; they win over `${X:-default}` only, as
            in a shell.
    """
    values, script = dict(variables or {}), Script()
    for words in _commands(text, values):
        for word in words:
            if _OVERRIDE.match(word):
                script.overrides.append(word.removeprefix("--"))
                if "$" in word or "`" in word:
                    script.unresolved.append(word)
    return script


def _commands(text: str, values: dict[str, str]):
    """Words of each command that is more than assignments; assignments go into `values`."""
    position, words = 0, list[str]()
    while position <= len(text):
        word, position, ended = _word(text, position, values)
        if word is not None:
            words.append(word)
        if ended or position >= len(text):
            rest = words[1:] if words[:1] == ["export"] else words
            # `a.b=c` is no name a shell could assign to: a bare list of overrides
            if rest and all(_ASSIGNMENT.match(w) for w in rest):
                for name, _, value in (w.partition("=") for w in rest):
                    values[name] = value
            elif rest:
                yield rest
            words = []
            if position >= len(text):
                return


def _word(text: str, at: int, values: dict[str, str]) -> tuple[str | None, int, bool]:
    """The next word (None between words), where to go on, and whether its command ends there."""
    parts: list[str] = []
    is_word, quote = False, ""
    while at < len(text):
        char = text[at]
        if quote:
            if char == quote:
                quote, at = "", at + 1
            elif char == "$" and quote == '"':
                value, at = _expand(text, at, values)
                parts.append(value)
            elif char == "\\" and quote == '"' and text[at + 1 : at + 2] in ('"', "\\", "$", "`"):
                parts.append(text[at + 1])
                at += 2
            else:
                parts.append(char)
                at += 1
        elif char in "'\"":
            quote, is_word, at = char, True, at + 1
        elif text.startswith("\\\n", at):
            at += 2
            if is_word:
                return "".join(parts), at, False
        elif char == "\\":
            parts.append(text[at + 1 : at + 2])
            is_word, at = True, at + 2
        elif char == "#" and not is_word:
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        elif char in _ENDS:
            return ("".join(parts) if is_word else None), at + 1, True
        elif char.isspace():
            at += 1
            if is_word:
                return "".join(parts), at, False
        elif char == "$":
            value, at = _expand(text, at, values)
            parts.append(value)
            is_word = True
        else:
            parts.append(char)
            is_word, at = True, at + 1
    return ("".join(parts) if is_word else None), at, True


def _expand(text: str, at: int, values: dict[str, str]) -> tuple[str, int]:
    """The value of the `$...` at `at`, as written when it cannot be known, and where it ends."""
    if text.startswith("$((", at):
        end = _closing(text, at + 1)
        return _arithmetic(text[at + 3 : end - 1], values, text[at : end + 1]), end + 1
    if text.startswith("$(", at):
        end = _closing(text, at + 1)
        return text[at : end + 1], end + 1
    if text.startswith("${", at):
        end = _closing(text, at + 1)
        name, _, default = text[at + 2 : end].partition(":-")
        if values.get(name):
            return values[name], end + 1
        if ":-" in text[at : end + 1]:
            return _word(default + "\n", 0, values)[0] or "", end + 1
        return text[at : end + 1], end + 1
    match = _NAME.match(text, at + 1)
    if match is None:  # $@, $1, $?: the caller's
        return "", at + 2
    return values.get(match[0], match[0].join(("$", ""))), match.end()


def _closing(text: str, at: int) -> int:
    """Where the bracket at `at` closes; the end of the text when it does not."""
    pairs, depth = {"(": ")", "{": "}"}, 0
    for place in range(at, len(text)):
        if text[place] == text[at]:
            depth += 1
        elif text[place] == pairs[text[at]]:
            depth -= 1
            if depth == 0:
                return place
    return len(text) - 1


def _arithmetic(expression: str, values: dict[str, str], as_written: str) -> str:
    plain = _NAME.sub(lambda m: values.get(m[0], m[0]), expression.replace("$", ""))
    plain = plain.replace("{", "").replace("}", "")
    try:
        return str(_evaluate(ast.parse(plain.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return as_written


def _evaluate(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    raise ValueError("more than + - * / % of whole numbers")
