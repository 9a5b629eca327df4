"""The adapters of a model by name."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView

from torch import nn


class AdapterDict(nn.ModuleDict):
    """A ModuleDict whose names may have dots, as "qwen-0.5b-alpaca".

    torch allows no dots in a module's name, so the module's own name, which the keys of a state dict begin
    with, has underscores there. An adapter is found by either name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[str, str] = {}  # the module's name -> the name that was given

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(module_name(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(module_name(key), module)
        self._given[module_name(key)] = key

    def __delitem__(self, key: str) -> None:
        super().__delitem__(module_name(key))
        del self._given[module_name(key)]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and module_name(key) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._given[name] for name in self._modules)

    def keys(self) -> KeysView[str]:
        return dict.fromkeys(self).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return {name: self[name] for name in self}.items()


def module_name(name: str) -> str:
    """The name of an adapter's module."""
    return name.replace(".", "_")
