"""What the YAML file and the command line say, key by key, as plain text: the two have one syntax of values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from glm4.errors import OptionError
from glm4.mindformers.keys import BY_FLAG, BY_PATH, SECTIONS, Said, did_you_mean, find, path_of

_FLAG = re.compile(r"--([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)
_OWN_FLAGS = ("config", "options", "debug", "help")
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
)


@dataclass(slots=True)
class CommandLine:
    """The words of the command line, sorted out."""

    config: str = ""
    said: dict[str, Said] = field(default_factory=dict)
    """By full dotted key; of a flag that is given twice, the last one counts."""


def read_flags(argv: Sequence[str]) -> CommandLine:
    """The command line `--flag value …`, `--flag=value`, `--a.b.c value`, `--options a.b=value …`.

    Raises OptionError for a flag that is not known, with the nearest one, and for one without its value.
    """
    line = CommandLine()
    for name, values in _flags(argv):
        if name not in _OWN_FLAGS and name not in BY_FLAG and find(name) is None:
            raise OptionError(f"unknown flag --{name}{did_you_mean(name, _OWN_FLAGS)}")
        if name in ("debug", "help"):  # main's
            if values:
                raise OptionError(f"--{name} takes no value, not {' '.join(values)}")
        elif not values:
            raise OptionError(f"--{name} needs a value: --{name} VALUE")
        elif name == "config":
            if len(values) != 1:
                raise OptionError(f"--config takes one value, not {len(values)}: {' '.join(values)}")
            line.config = values[0]
        elif name == "options":
            for pair in values:
                key, equals, value = pair.partition("=")
                if not equals:
                    raise OptionError(f"--options {pair}: write it as key=value")
                if key not in BY_FLAG and find(key) is None:
                    raise OptionError(f"--options {pair}: unknown key {key!r}{did_you_mean(key)}")
                line.said[_full_path(key)] = Said((value,), f"--options {key}", by_flag=True)
        else:
            line.said[_full_path(name)] = Said(tuple(values), f"--{name}", by_flag=True)
    return line


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag's name with the words up to the next flag; a word with a space before any `=` is never a flag."""
    name, values = "", list[str]()
    for word in argv:
        if match := _FLAG.fullmatch(word):
            if name:
                yield name, values
            name, values = match[1], [] if match[2] is None else [match[2]]
        elif name:
            values.append(word)
        else:
            raise OptionError(f"{word!r} belongs to no flag: write --flag {word}")
    if name:
        yield name, values


def _full_path(name: str) -> str:
    return BY_FLAG[name].path if name in BY_FLAG else name


def find_config(config: str, repository: Path | None) -> Path:
    """The YAML file that `--config` names: in the caller's folder, else in the repository.

    Raises OptionError where it is in neither.
    """
    if not config:
        raise OptionError("--config is missing: pass --config configs/glm4/predict_glm4.yaml")
    try:
        given = path_of(config) or Path()
    except OptionError as error:
        raise OptionError(f"--config {error}") from error
    candidates = [given, *([repository / config] if repository else [])]
    for path in candidates:
        if path.is_file():
            return path
    if any(path.is_dir() for path in candidates):
        raise OptionError(f"--config {config} is a folder: name the YAML file in it")
    looked = " and ".join(dict.fromkeys(str(path.absolute().parent) for path in candidates))
    raise OptionError(f"--config {config}: no such file (looked in {looked})")


def read_yaml(path: Path) -> dict[str, Said]:
    """The keys of a YAML file, by dotted path; a null says nothing.

    Only the shape is read, never built into objects, so a value is the text that stands in the file. Raises
    OptionError with the line number for a file that is not valid YAML, a key that is not known or stands twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise OptionError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise OptionError(f"{path}:{line}: a control character is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join((error.problem or "not valid YAML").split())
        raise OptionError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise OptionError(f"{path}: not valid YAML: nested too deeply") from error
    if root is None:
        raise OptionError(f"{path} is empty: configs/glm4/predict_glm4.yaml shows what belongs in it")
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"{path}:{root.start_mark.line + 1}: not a list of 'key: value' lines")
    return dict(_leaves(root, "", path, {}))


def _leaves(section: yaml.MappingNode, prefix: str, path: Path, seen: dict[str, int]) -> Iterator[tuple[str, Said]]:
    for key_node, node in section.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise OptionError(f"{path}:{line}: a key must be one word")
        name = prefix + key_node.value
        where = f"{path}:{line}: {name}"
        if name in seen:
            raise OptionError(f"{where} stands twice (first in line {seen[name]}): keep one of the two")
        seen[name] = line
        if name not in SECTIONS and find(name) is None:
            raise OptionError(f"{path}:{line}: unknown key {name!r}{did_you_mean(name)}")
        if node.tag == "tag:yaml.org,2002:null":
            continue
        if name in SECTIONS and name not in BY_PATH:
            if not isinstance(node, yaml.MappingNode):
                raise OptionError(f"{where} is a section: write its keys below it, indented")
            yield from _leaves(node, f"{name}.", path, seen)
        else:
            yield name, Said(tuple(_texts(node, name, where)), where, by_flag=False)


def _texts(node: yaml.Node, name: str, where: str) -> Iterator[str]:
    key = find(name)
    if key is not None and key.path.endswith(".*"):
        return  # a section that is ignored as a whole is not looked into
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in [node, *items]:
        if item.tag not in _PLAIN_TAGS:
            raise OptionError(f"{where}: the tag {item.tag} is not allowed; write a plain value")
    for item in items:
        if not isinstance(item, yaml.ScalarNode):
            raise OptionError(f"{where} takes a value, not a section below it")
        yield item.value
