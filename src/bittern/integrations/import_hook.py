"""Registers bittern when diffusers is imported, whichever of the two comes first.

Diffusers has no entry points for quantizers and attention backends: someone must add to its registries. Importing
diffusers for that would cost every user seconds, so we wait for the modules that hold them. Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRIES = {
    "diffusers.quantizers.auto": "bittern.integrations.diffusers",
    "diffusers.models.attention_dispatch": "bittern.integrations.attention_backend",
}
"""Diffusers' modules that hold registries, and ours that register themselves when they are imported."""


def install() -> None:
    """Registers now in registries that are loaded, and in the others as soon as they are."""
    for registry in REGISTRIES:
        if registry in sys.modules:
            _register(registry)
        elif not any(isinstance(finder, _Finder) and finder.registry == registry for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(registry))


def _register(registry: str) -> None:
    # The module registers itself: it may be the one whose import has brought us here.
    importlib.import_module(REGISTRIES[registry])


class _Finder(MetaPathFinder):
    """Finds only one registry, and has it loaded by a loader that registers afterwards."""

    def __init__(self, registry: str) -> None:
        self.registry, self.asking = registry, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.registry or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """The module's own loader, and registration after it."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Give the module its own loader back: inspect.getsource and the like ask it.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self.finder]
        _register(self.finder.registry)
