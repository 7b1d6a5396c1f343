"""`spd-zoo demo`: a page in the browser to try networks on images."""

import argparse

from spd_zoo.cli.common import Commands, add_command, explained

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "demo", _run, "serve a page on this machine to try networks on images")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on (default: 7860)")
    command.add_argument("--models", nargs="+", default=(), metavar="MODEL", help="more networks or runs to offer")
    command.add_argument(
        "--allow-host",
        nargs="+",
        default=(),
        metavar="NAME",
        help="other host names of the page, for example behind a proxy (default: only --host)",
    )


def _run(options: argparse.Namespace) -> int:
    with explained():
        from spd_zoo.demo import serve

        serve(options.models, options.host, options.port, options.allow_host)
    return 0
