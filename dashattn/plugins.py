"""What is known by name: our own, and what installed packages add by entry points.

    [project.entry-points."dashattn.backends"]
    streaming = "streaming_backend:BACKEND"

Packages are looked through when a name is asked for that is not ours, or when names are listed, and imported when
theirs is asked for.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping, of which ``values`` and ``items`` would import every package: ``own`` are those of ours alone.

    Args:
        group: of the entry points.
        own: ours, by name.
        checked: what an entry point named, if it is one of these; else raises ValueError or TypeError.
        reserved: names that stand for something else here.

    Raises ValueError, where names of packages are looked at: one is ours, reserved or brought by two of them, or what
    is asked for cannot be imported or is none of these.
    """

    def __init__(
        self, group: str, own: Mapping[str, T], checked: Callable[[str, object], T], reserved: Collection[str] = ()
    ):
        self.group, self.own = group, own
        self._checked, self._reserved = checked, reserved
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            return self.own[name]
        point = self.plugins()[name]
        if point.value not in self._loaded:
            self._loaded[point.value] = self._load(point)
        return self._loaded[point.value]

    def __contains__(self, name: object) -> bool:
        return name in self.own or (not self.is_ours(name) and name in self.plugins())

    def __iter__(self) -> Iterator[str]:
        return iter((*self.own, *self.plugins()))

    def __len__(self) -> int:
        return len(self.own) + len(self.plugins())

    def is_ours(self, name: object) -> bool:
        """Whether no package may have that name; none is looked at."""
        return name in self.own or name in self._reserved

    def plugins(self) -> dict[str, EntryPoint]:
        """Those of installed packages, by name."""
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            name, whose = point.name, f"the package {_package(point)} has {point.name!r} among its {self.group}"
            if re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
                raise ValueError(f"{whose}: names are made of a-z, 0-9 and _; rename it, or uninstall the package")
            if self.is_ours(name):
                raise ValueError(f"{whose}, a name of dashattn's own: rename it, or uninstall the package")
            if name in found:
                raise ValueError(f"{whose}, and so has {_package(found[name])}: uninstall one of them")
            found[name] = point
        return found

    def _load(self, point: EntryPoint) -> T:
        try:
            return self._checked(point.name, point.load())
        except Exception as error:  # whatever the code of others raises
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{point.name} of {self.group} cannot be had from {point.value} of the package {_package(point)} "
                f"({said}): mend the package, or uninstall it"
            ) from error


def _package(point: EntryPoint) -> str:
    return "?" if point.dist is None else point.dist.name
