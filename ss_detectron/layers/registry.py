"""A registry of classes by name and short name."""

import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Protocol, TypeVar

__all__ = ["Registry"]


class _Named(Protocol):
    name: ClassVar[str]
    short_name: ClassVar[str]


T = TypeVar("T", bound=_Named)


def _names(cls: type[_Named]) -> list[str]:
    """What a class goes by, its full name first."""
    return [n for n in (cls.name, cls.short_name, *getattr(cls, "other_names", ())) if n]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


class Registry(Generic[T]):
    """
    Classes by their class attributes ``name``, ``short_name`` and, where they have any,
    ``other_names``, in any case and with any separators: "sign_symmetry", "Sign-Symmetry", "SS".

    Iteration gives pairs of a name and its class, as fvcore's registry does, which would bring
    more than torch with it.

    Args:
        kind: what is registered, for messages ("feedback rule").
        base: what every registered class extends.
        check: raises ValueError where a class cannot be registered.
    """

    def __init__(
        self, kind: str, base: type[T], check: Callable[[type[T]], object] | None = None
    ) -> None:
        self._kind = kind
        self._base = base
        self._check = check
        self._classes: dict[str, type[T]] = {}

    def check(self, cls: type[T]) -> type[T]:
        """
        Return ``cls``, if it is fit to be registered.

        Raises:
            ValueError: it does not extend the base class or has no name.
        """
        if not issubclass(cls, self._base):
            raise ValueError(
                f"{cls.__name__} is no {self._kind}: it must extend {self._base.__name__}"
            )
        if not getattr(cls, "name", ""):
            raise ValueError(f"{cls.__name__} needs a name, a class attribute")
        if self._check is not None:
            self._check(cls)
        return cls

    def register(self, cls: type[T] | None = None) -> Any:
        """
        Add a class; a decorator, with or without parentheses.

        Raises:
            ValueError: the class is not fit, or its name or short name is taken.
        """
        if cls is None:
            return self.register
        for name in _names(self.check(cls)):
            taken = self._find(name)
            if taken is not None:
                raise ValueError(
                    f"{cls.__name__} cannot be registered: the {self._kind} name {name!r} is "
                    f"{taken.__name__}'s"
                )
        self._classes[cls.name] = cls
        return cls

    def get(self, name: str) -> type[T]:
        """
        Return the class of that name, however it is written.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        found = self._find(name)
        if found is None:
            known = ", ".join(f"{n} ({c.short_name})" if c.short_name else n for n, c in self)
            raise ValueError(f"unknown {self._kind} {name!r}; choose one of {known}")
        return found

    def _find(self, name: object) -> type[T] | None:
        wanted = _plain(str(name))
        return next((c for _, c in self if wanted in map(_plain, _names(c))), None)

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[tuple[str, type[T]]]:
        return iter(self._classes.items())
