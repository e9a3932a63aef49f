"""Settings of a service: one frozen dataclass, filled once from flags, environment and file, in that order.

A field made by `setting(...)` becomes a flag (`max_running` is `--max-running`), an environment variable
(`QWIRE_WORKER_MAX_RUNNING`) and a key of the TOML file that `--config` names (`max_running`).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import click

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_CONFIGURATION = 2
"""Exit status when a setting is wrong."""
EXIT_UNUSABLE_MODEL = 3
"""Exit status when the model folder can't be served as it is; starting again won't help."""


class ConfigError(Exception):
    """A setting is wrong; the message names the flag."""


def setting(
    *,
    default: Any = dataclasses.MISSING,
    help: str,  # noqa: A002 - named as click names it
    type: click.ParamType[Any] | type | None = None,  # noqa: A002
    multiple: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field that is a setting. Without a default it is required. A `secret` is masked in logs."""
    metadata = {"help": help, "type": type, "multiple": multiple, "secret": secret}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass of settings."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def command(config_type: type[T], run: Callable[[T], None], *, service: str, name: str = "serve") -> click.Command:
    """A click command whose options are the settings of `config_type`, and that calls `run` with them.

    It logs to stderr, the settings first. Environment variables start with `QWIRE_` and the service's name.

    A `ConfigError` from the dataclass's `__post_init__` or from `run` is a usage error (exit status 2).
    """

    def callback(**values: Any) -> None:
        values.pop("config")
        configure_logging(service)
        try:
            config = config_type(**values)
            log.info("settings: %s", describe(config))
            run(config)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error

    fields = dataclasses.fields(config_type)  # type: ignore[arg-type]
    env_prefix = f"QWIRE_{service.upper()}"
    options: list[click.Parameter] = [_option(field, env_prefix) for field in fields]
    options.append(
        click.Option(
            ["--config"],
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=True,
            callback=_read_file,
            help="A TOML file of settings; flags and environment win over it.",
        )
    )
    return click.Command(name, params=options, callback=callback, help=config_type.__doc__)


def describe(config: Any) -> str:
    """All settings on one line, secrets masked."""
    shown = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        shown.append(f"{field.name}={'***' if field.metadata.get('secret') and value else value!r}")
    return " ".join(shown)


def configure_logging(service: str) -> None:
    """Plain lines on stderr. Prompts and outputs are never logged."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {service} %(levelname)s %(name)s: %(message)s"
    )


def _option(field: dataclasses.Field[Any], env_prefix: str) -> click.Option:
    flag = "--" + field.name.replace("_", "-")
    default = None if field.default is dataclasses.MISSING else field.default
    is_flag = isinstance(default, bool)
    arguments: dict[str, Any] = {
        "envvar": f"{env_prefix}_{field.name.upper()}",
        "help": field.metadata["help"],
        "show_default": default not in (None, (), ""),
        "required": field.default is dataclasses.MISSING,
        "multiple": field.metadata["multiple"],
    }
    if field.default is not dataclasses.MISSING:
        arguments["default"] = default
    if is_flag:
        return click.Option([f"{flag}/--no-{flag[2:]}"], **arguments)
    kind = field.metadata["type"] or (type(default) if default is not None and default != () else str)
    return click.Option([flag], type=kind, **arguments)


def _read_file(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise click.UsageError(f"--config: {path} can't be read: {error}") from error
        known = {option.name for option in context.command.params}
        if unknown := sorted(set(values) - known):
            raise click.UsageError(f"--config: {path} holds unknown settings: {', '.join(unknown)}")
        context.default_map = {**(context.default_map or {}), **values}
    return path
