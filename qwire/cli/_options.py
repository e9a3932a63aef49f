"""Options that commands share. Their names are those of the contract's fields, in kebab case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qwire._channel import DEFAULT_ADDRESS

_Function = TypeVar("_Function", bound=Callable[..., Any])


def id_list(value: str) -> list[int]:
    """Ids separated by commas; a usage error if it is something else."""
    items = [item.strip() for item in value.split(",")]
    if not all(item.isascii() and item.isdecimal() for item in items):
        raise click.BadParameter(f"{value!r} is no list of ids such as 1,2,3")
    return [int(item) for item in items]


def bias(value: str) -> tuple[int, float]:
    """ID=BIAS; a usage error if it is something else."""
    token, separator, amount = value.partition("=")
    try:
        if separator and token.isascii() and token.isdecimal():
            return int(token), float(amount)
    except ValueError:
        pass
    raise click.BadParameter(f"{value!r} is not of the form 42=-1.5")


def file_or_text(value: str) -> str:
    """The content of a file of that name, or the text itself where it can't be a name; a usage error for neither."""
    if "\n" in value or value.lstrip().startswith("{") or value in ("true", "false"):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if ":" in value:  # a grammar on one line
            return value
        raise click.BadParameter(f"{value!r} can't be read: {error}") from error


def _all(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def address_option(function: _Function) -> _Function:
    """--address"""
    return click.option(
        "--address",
        default=[DEFAULT_ADDRESS],
        multiple=True,
        show_default=True,
        metavar="TARGET",
        help="gRPC target of the router; repeatable, for several routers of which one may be gone.",
    )(function)


def model_option(function: _Function) -> _Function:
    """--model"""
    return click.option("--model", metavar="NAME", help="Served model; needn't be given where there is but one.")(
        function
    )


def sampling_options(function: _Function) -> _Function:
    """Everything that says how tokens are drawn and when to stop; unset means the server's default."""
    return _all(
        click.option("--max-tokens", type=int, help="Stop after this many tokens."),
        click.option("--min-tokens", type=int, help="Don't stop before this many tokens."),
        click.option("--temperature", type=float, help="0 always takes the most probable token."),
        click.option("--top-p", type=float, help="Keep the most probable tokens up to this probability."),
        click.option("--top-k", type=int, help="Keep this many tokens; 0 is off."),
        click.option("--min-p", type=float, help="Drop tokens less probable than this times the best one."),
        click.option("--repetition-penalty", type=float, help="Divides logits of tokens that were there; 1 is off."),
        click.option("--frequency-penalty", type=float, help="Subtracted for each time the output holds a token."),
        click.option("--presence-penalty", type=float, help="Subtracted if the output holds a token."),
        click.option(
            "--logit-bias",
            type=bias,
            multiple=True,
            metavar="ID=BIAS",
            help="Add to the logit of a token; repeatable.",
        ),
        click.option("--bad-words", multiple=True, metavar="TEXT", help="Don't say this word; repeatable."),
        click.option(
            "--allowed-token-ids",
            type=id_list,
            metavar="ID,ID,...",
            multiple=True,
            help="Draw only these ids; repeatable, or with commas.",
        ),
        click.option("--seed", type=int, help="The same request and seed give the same tokens."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop at this text; repeatable."),
        click.option(
            "--stop-token-ids",
            type=id_list,
            metavar="ID,ID,...",
            multiple=True,
            help="Stop at these ids; repeatable, or with commas.",
        ),
        click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the model's own end."),
        click.option("--include-stop", is_flag=True, default=None, help="Keep the stop text in the output."),
        click.option("--json-schema", type=file_or_text, metavar="FILE|JSON", help="Hold the output to a JSON schema."),
        click.option("--json-object", is_flag=True, default=None, help="Hold the output to any JSON object."),
        click.option("--regex", metavar="REGEX", help="Hold the output to a regular expression."),
        click.option("--grammar", type=file_or_text, metavar="FILE|LARK", help="Hold the output to a Lark grammar."),
        click.option("--choice", multiple=True, metavar="TEXT", help="Hold the output to one of these; repeatable."),
        click.option(
            "--free-thinking", is_flag=True, default=None, help="Leave a thinking section free of the constraint."
        ),
        click.option(
            "--enable-thinking/--no-enable-thinking", default=None, help="Ask a thinking model to think, or not to."
        ),
    )(function)


def flatten_lists(options: dict[str, Any]) -> dict[str, Any]:
    """Repeated lists to one, and repeatable options that weren't given to unset."""
    flat = {
        name: [item for items in options[name] for item in items] for name in ("stop_token_ids", "allowed_token_ids")
    }
    plain = {name: list(options[name]) for name in ("stop", "bad_words", "choice")}
    lists = {name: items or None for name, items in {**flat, **plain}.items()}
    return {**options, **lists, "logit_bias": dict(options["logit_bias"]) or None}
