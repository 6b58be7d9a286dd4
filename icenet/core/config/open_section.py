"""A section with options that code of the user reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, model_validator

from icenet.core.config.section import Section, nearest, to_python
from icenet.core.errors import ConfigError


class MissingOptionError(ConfigError, AttributeError):
    """An option that the user's code reads and the configuration lacks. `getattr` with a default catches it."""


class OpenSection(Section):
    """A section that also has options of any name, as attributes."""

    model_config = ConfigDict(extra="allow")
    selector: ClassVar[str] = "type"
    """The key that names the code."""

    @model_validator(mode="before")
    @classmethod
    def _options_to_python(cls, values: Any) -> Any:
        return {key: to_python(value) for key, value in values.items()} if isinstance(values, Mapping) else values

    if not TYPE_CHECKING:  # otherwise every name would be an attribute to type checkers

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_"):
                    raise
                known = [*type(self).model_fields, *(self.__pydantic_extra__ or {})]
                raise MissingOptionError(
                    f"{self.section}.{name}: {getattr(self, self.selector)} reads this option, which is not under "
                    f"{self.section}{nearest(name, known)}; add it there, or with --set {self.section}.{name}=VALUE"
                ) from None
