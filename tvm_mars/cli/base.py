"""What the commands share: errors, options, output."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mars_runtime import MarsArch

__all__ = [
    "CommandError",
    "MarsCommand",
    "arch_options",
    "channel_order_option",
    "engine_option",
    "input_shapes",
    "progress_bar",
    "read_arch",
    "set_option",
    "write_file",
    "write_text",
]

Function = TypeVar("Function", bound=Callable[..., Any])

PIPE_CLOSED = 141  # as a program that SIGPIPE ends


class CommandError(click.ClickException):
    """An error that the user can mend."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        click.echo(f"error: {self.message}", file=file, err=file is None)


class MarsCommand(click.Command):
    """A command whose MarsErrors become messages and exit code 1; it has the option --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_note_debug,
                help="Show the traceback of an error.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        from mars_runtime.errors import MarsError

        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has gone, as in `mars disasm net.mars | head`. What is still buffered
            # must not fail again when Python flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)
        except (MarsError, OSError) as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            raise CommandError(_message(error)) from None
        return result


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


_DEBUG = f"{__name__}.debug"


def _note_debug(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    ctx.meta[_DEBUG] = wanted


# -- the architecture ------------------------------------------------------------------------------


def assignments(
    _ctx: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    from mars_runtime.errors import OptionError

    from ..options import read_assignment

    try:
        return dict(map(read_assignment, given))
    except OptionError as error:
        raise click.BadParameter(str(error)) from None


def input_shapes(
    _ctx: click.Context, _parameter: click.Parameter, given: str | None
) -> dict[str, tuple[int, ...]]:
    """Read shapes of inputs as tvmc writes them: ``x:[1,3,32,32] y:[1,10]``."""
    found = {}
    rest = (given or "").strip()
    while rest:
        entry = _SHAPE.match(rest)
        if entry is None:
            raise click.BadParameter(f"{rest!r} is not NAME:[SIZE,SIZE,...]")
        found[entry["name"]] = tuple(int(size) for size in entry["sizes"].split(","))
        rest = rest[entry.end() :]
    return found


_SHAPE = re.compile(r"(?P<name>[^\s\[]+):\s*\[(?P<sizes>\s*\d+\s*(,\s*\d+\s*)*)\]\s*")

_set_option = click.option(
    "--set",
    "changes",
    metavar="FIELD=VALUE",
    multiple=True,
    callback=assignments,
    help="Change a field of the machine; may be repeated. `mars arch` lists the fields.",
)


def set_option(function: Function) -> Function:
    """Add ``--set``, as the parameter ``changes``."""
    return _set_option(function)


def arch_options(function: Function) -> Function:
    """Add ``--arch`` and ``--set``, as the parameters ``arch`` and ``changes``."""
    arch = click.option(
        "--arch",
        metavar="PRESET|FILE.toml",
        default="mars",
        show_default=True,
        help="The machine; `mars arch --list` lists the presets.",
    )
    return arch(set_option(function))


def read_arch(source: str, changes: Mapping[str, str]) -> MarsArch:
    """Give the machine that the options name."""
    from mars_runtime import load_arch

    return load_arch(source, changes)


_CHANNEL_ORDERS = ("given", "packed")  # tvm_mars.options.CHANNEL_ORDERS, without its import

channel_order_option = click.option(
    "--channel-order",
    type=click.Choice(_CHANNEL_ORDERS),
    default="given",
    show_default=True,
    help="Order of channels inside the network: packed searches for one in which fewer group-sets "
    "hold a weight. The codes that leave are the same.",
)

_ENGINES = ("auto", "layers", "machine")  # mars_runtime.ENGINES, without its import

engine_option = click.option(
    "--engine",
    type=click.Choice(_ENGINES),
    default=None,
    help="What executes: whole layers on this processor's dot-product instructions, or the "
    "machine, instruction by instruction; the codes are the same. [default: $MARS_ENGINE, or auto: "
    "layers wherever a program consists of them]",
)


# -- output ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(count: int, label: str = "running") -> Iterator[Callable[[int], None]]:
    """Give what is told how much is done; it draws a bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with click.progressbar(length=count, label=label, file=sys.stderr, show_pos=True) as bar:
        yield lambda done: bar.update(done - bar.pos)


def write_file(path: str, data: bytes) -> None:
    """Write a file atomically."""
    from mars_runtime.program import write_atomically

    try:
        write_atomically(path, data)
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, path) from None


def write_text(text: str, path: str | None) -> None:
    """Write text to a file, or to stdout for None or ``-``."""
    if path is None or path == "-":
        click.echo(text, nl=not text.endswith("\n"))
    else:
        write_file(path, f"{text.rstrip()}\n".encode())
