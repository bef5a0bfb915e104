"""Settings as they were given, checked into a configuration."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gradlab.checks import UsageError, unknown_name
from trainers.config import TrainConfig


class BadSetting(UsageError):
    """A setting that can't be used.

    Attributes:
        setting: Its dotted name.
    """

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def make_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Check settings.

    Args:
        settings: Nested settings; what is missing gets its default.

    Returns:
        The configuration.

    Raises:
        BadSetting: If a name or a value is not one that may be.
    """
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = where.rpartition(".")[0]
        known = [path for path, _ in setting_fields() if path.rpartition(".")[0] == section]
        raise BadSetting(where, str(unknown_name("setting", where, known)))
    raise BadSetting(where, f"`{where}`: {first['msg']}. Got {where}={first['input']!r}.")


def setting_fields(
    model: type[BaseModel] = TrainConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """List every setting, sections taken apart.

    Args:
        model: Whose fields.
        prefix: What dotted names begin with.

    Yields:
        Dotted name and description.
    """
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from setting_fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field
