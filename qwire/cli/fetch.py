"""`qwire fetch`: a model onto this machine, before anything serves it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from qwire import hub


@click.command()
@click.argument("model", default=hub.DEMO)
@click.option(
    "--to",
    "link",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Make FOLDER a symbolic link to the model, in one step, in place of an older link.",
)
def fetch(model: str, link: Path | None) -> None:
    """Gets a model unless it is there, and prints its folder.

    MODEL is a hub id such as Qwen/Qwen3-0.6B, demo, or a folder.
    """
    try:
        folder = hub.resolve(model, sys.stderr)
        if link is not None:
            _link(link, folder)
    except hub.HubError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(130)
    click.echo(link or folder)


def _link(link: Path, folder: Path) -> None:
    """Makes `link` point to `folder`; whoever opens it meanwhile finds the old model or the new one.

    A link, as a copy would take its space twice and could be seen half done. It is relative if the model lies beside it
    or deeper, so that both can be moved, or be mounted elsewhere, together.
    """
    if link.exists() and not link.is_symlink():
        raise click.ClickException(f"{link} is there, and is no link that an earlier fetch could have made")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        parent, target = link.parent.resolve(), folder.resolve()
        if target.is_relative_to(parent):
            target = target.relative_to(parent)
        if link.is_symlink() and link.readlink() == target:
            return
        # In a container each run has the same process id, so a run that was killed may have left this.
        fresh = link.with_name(f".{link.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
    except OSError as error:
        raise click.ClickException(f"can't make {link} a link to {folder}: {error.strerror or error}") from error
