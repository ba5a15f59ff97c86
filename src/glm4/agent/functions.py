"""Python functions as tools: shown to a model, and called with the arguments it writes."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import msgspec

from glm4.agent.signature import Signature
from glm4.errors import OptionError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """One function that a model may call."""

    name: str
    signature: Signature
    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> FunctionTool:
        """The tool that `function` is; see `Signature.of` for what it must have. Raises OptionError."""
        where = f"function {function.__name__}"
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None:
            where = f"{code.co_filename}:{code.co_firstlineno}: {function.__name__}"
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise OptionError(f"{where} is async, and tools are called one after the other; give a plain function")
        return cls(function.__name__, Signature.of(function, where), function)

    @property
    def spec(self) -> Json:
        """The tool in OpenAI's shape, as `LLM.chat` takes it."""
        signature = self.signature
        function = {"name": self.name, "description": signature.description, "parameters": signature.parameters}
        return {"type": "function", "function": function}

    def call(self, arguments: str) -> str:
        """The function's result for these arguments, the JSON text that a model wrote, in words for the model.

        A result that is no text becomes JSON. Whatever goes wrong becomes `{"error": …}`, for the model can often do
        better the next time; only KeyboardInterrupt is raised. What the function prints goes to standard error.
        """
        try:
            values = msgspec.json.decode(arguments, type=self.signature.arguments)
        except (msgspec.ValidationError, RecursionError) as error:
            return error_result(f"wrong arguments: {error}")
        except ValueError as error:
            return error_result(f"the arguments are not valid JSON: {error}")
        try:
            with redirect_stdout(sys.stderr):
                result = self.function(**msgspec.structs.asdict(values))
            return _as_text(result)
        except (Exception, SystemExit) as error:
            return error_result(f"{type(error).__name__}: {error}")


def error_result(reason: str) -> str:
    """What a model reads in place of a result."""
    return _as_text({"error": reason})


def _as_text(result: Any) -> str:
    is_text = isinstance(result, str)
    text: str = result if is_text else json.dumps(msgspec.to_builtins(result, str_keys=True), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text


def load_tools(file: str | Path) -> list[FunctionTool]:
    """The public functions that the Python file defines, or those that its `__all__` names, in order.

    The file is run, as `python FILE` would run it: its folder comes first in the search for modules.
    Raises OptionError for a file that cannot be read or run, or has no function that can be a tool.
    """
    path = Path(file)
    module = _run(path)
    named = getattr(module, "__all__", None)
    missing = [name for name in named or () if not isinstance(getattr(module, name, None), FunctionType)]
    if missing:
        raise OptionError(f"{path}: __all__ names {missing[0]!r}, which is no function there; correct it")
    public = named or [name for name in vars(module) if not name.startswith("_")]
    found = [getattr(module, name) for name in public]
    functions = [f for f in found if isinstance(f, FunctionType) and (named or f.__module__ == module.__name__)]
    if not functions:
        raise OptionError(f"{path} defines no public function: write one with type hints and a docstring")
    return list({function.__name__: FunctionTool.of(function) for function in functions}.values())


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"{path} is no file: give a Python file whose functions are the tools")
    name = f"tools of {path}"  # which nobody can import by accident
    spec = spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and type hints look things up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise OptionError(f"{error.filename}: line {error.lineno}: {error.msg}; correct it") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"line {lines[-1]}: " if lines else ""
        raise OptionError(f"{path}: {place}{type(error).__name__}: {error}; the file must run by itself") from error
    return module
