"""Three tools for `glm4 chat --tools`: files of one folder, a search over them, and a calculator.

What the docstrings say is what the model reads. They are in Chinese because the demo model learned these words.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(os.environ.get("AGENT_FOLDER") or Path(__file__).with_name("files")).resolve()
"""Nothing outside this folder is read."""

MAX_CHARACTERS = 100_000
MAX_LINES = 10


def read_file(path: str) -> str:
    """读一个文件

    Args:
        path: 文件名
    """
    file = (FOLDER / path).resolve()  # follows links, so that none leads out of the folder
    if not file.is_relative_to(FOLDER):
        raise ValueError(f"{path} is outside the folder")
    if not file.is_file():
        raise ValueError(f"{path} is no file; there are {', '.join(map(_name, _files()))}")
    return _text(file)


def search(query: str) -> dict[str, str]:
    """在文件夹里搜索

    Args:
        query: 关键词
    """
    words = query.lower().split()
    lines = [f"{_name(file)}: {line}" for file in _files() for line in _text(file).splitlines() if line.strip()]
    scores = [sum(word in line.lower() for word in words) for line in lines]
    best = max(scores, default=0)
    found = [line for line, score in zip(lines, scores, strict=True) if score == best > 0]
    return {"result": "\n".join(found[:MAX_LINES])}


def calculator(expression: str) -> dict[str, int | float]:
    """计算一个算式

    Args:
        expression: 算式
    """
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    try:
        tree = ast.parse(expression.translate(CHINESE_SIGNS).strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no expression of numbers and + - * / // % **") from error
    return {"result": _value(tree.body)}


CHINESE_SIGNS = str.maketrans("×÷－＋（）", "*/-+()")

OPERATIONS: dict[type[ast.AST], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _value(node: ast.expr) -> int | float:
    """The value of an expression of numbers; whatever else Python could say is refused."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATIONS:
            return OPERATIONS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATIONS:
            return _combined(sign, _value(left), _value(right))
    raise ValueError(f"{ast.unparse(node)!r} is no number, and only + - * / // % ** combine numbers")


def _combined(sign: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(sign, ast.Pow) and isinstance(left, int) and left.bit_length() * abs(right) > 4096:
        raise ValueError("the power is too large")
    value = OPERATIONS[type(sign)](left, right)
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    return value


def _files() -> Iterator[Path]:
    """The text files of the folder, those that begin with a dot left out."""
    for file in sorted(FOLDER.rglob("*.*")):
        hidden = any(part.startswith(".") for part in file.relative_to(FOLDER).parts)
        if file.suffix in (".md", ".txt") and not hidden and file.is_file() and file.resolve().is_relative_to(FOLDER):
            yield file


def _name(file: Path) -> str:
    return file.relative_to(FOLDER).as_posix()


def _text(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return lines.read(MAX_CHARACTERS)
