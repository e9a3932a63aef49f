"""Settings: flags win over environment, environment over file, and all of them are documented."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwire.service.config import ConfigError, command, describe, setting, settings
from scripts.settings import page


@settings
class Config:
    """A service."""

    target: tuple[str, ...] = setting(help="Targets.", multiple=True)
    limit: int = setting(default=5, help="A limit.")
    open: bool = setting(default=False, help="A switch.")
    key: str = setting(default="", help="A key.", secret=True)

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError("--limit: must not be negative")


def run(*arguments: str, env: dict[str, str] | None = None) -> Config | str:
    seen: list[Config] = []
    logging.getLogger().handlers.clear()
    result = CliRunner().invoke(command(Config, seen.append, service="test"), arguments, env=env)
    if seen:
        return seen[0]
    assert result.exit_code == 2
    return result.output


def test_flags_environment_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('target = ["a", "b"]\nlimit = 1\nopen = true\n')
    assert run("--config", str(file)) == Config(target=("a", "b"), limit=1, open=True)
    environment = {"QWIRE_TEST_LIMIT": "2"}
    assert run("--config", str(file), env=environment) == Config(target=("a", "b"), limit=2, open=True)
    flags = ("--config", str(file), "--limit", "3", "--no-open", "--target", "c")
    assert run(*flags, env=environment) == Config(target=("c",), limit=3, open=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--target"),
        (("--target", "x", "--limit", "many"), "--limit"),
        (("--target", "x", "--limit", "-1"), "must not be negative"),
        (("--nope",), "--nope"),
    ],
)
def test_what_is_wrong_is_named(arguments: tuple[str, ...], says: str) -> None:
    assert says in str(run(*arguments))


def test_a_file_with_unknown_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("limt = 1\n")
    assert "limt" in str(run("--target", "x", "--config", str(file)))
    file.write_text("not toml")
    assert "can't be read" in str(run("--target", "x", "--config", str(file)))


def test_secrets_are_masked() -> None:
    assert "hunter2" not in describe(Config(target=("x",), key="hunter2"))


def test_the_documented_settings_are_the_real_ones() -> None:
    documented = Path(__file__).parents[2] / "docs" / "settings.md"
    assert documented.read_text(encoding="utf-8") == page(), "stale: make docs"
