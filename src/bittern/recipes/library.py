"""Finds recipes: the named ones beside this file, and YAML files of the user's."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import resources
from pathlib import Path
from typing import Any

from bittern.errors import UserError, did_you_mean
from bittern.recipes.model import Recipe
from bittern.recipes.validation import validated

SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The named recipes, sorted."""
    here = resources.files("bittern.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in here if file.name.endswith(".yaml"))


def load(name_or_path: str | Path) -> Recipe:
    """The recipe of that name, or the one in that YAML file.

    Raises:
        UserError: for an unknown name, an unreadable file, an unknown key or a value that does not fit.
    """
    text = str(name_or_path)
    if text in names():
        source = resources.files("bittern.recipes").joinpath(f"{text}.yaml")
        return _parse(source.read_text(encoding="utf-8"), f"recipe {text}")
    path = Path(text).expanduser()
    if path.suffix not in SUFFIXES and not path.is_file():
        raise UserError(f"unknown recipe {text!r}: {did_you_mean(text, names())}, or the path of a .yaml file")
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe file {text!r}: {error.strerror}; expected a readable YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe file {text!r} is not text: expected YAML in UTF-8") from None
    return _parse(content, f"recipe {text}", default_name=path.stem)


def _parse(text: str, where: str, default_name: str | None = None) -> Recipe:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, where YAML would quietly take the second."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                key = str(key_node.value)
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"{where}: key {key!r} is given twice (line {line}): remove one")
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{where}: not valid YAML at line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if default_name and isinstance(data, dict):
        data.setdefault("name", default_name)
    return validated(Recipe, data, where)
