"""Configurations from keyword options."""

from typing import Any

from fastllama.config import Config, config_from_dict


def with_options(**options: Any) -> Config:
    """The defaults with `group__field=value` changed."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        group, _, key = name.partition("__")
        values.setdefault(group, {})[key] = value
    return config_from_dict(values, source="test")
