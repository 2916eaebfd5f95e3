#!/usr/bin/env python3
"""One long training run, extended by every file you drop.

python daemon.py                 watch inbox/ and train what arrives (Ctrl-C: checkpoint, then leave)
python daemon.py run --drain     train what is there, then leave
python daemon.py status          what it is doing
python daemon.py demo            see it work in a scratch folder, without a download
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun import __version__
from longrun.errors import exit_code
from longrun.home import Home, find_home

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_CODES = """\
exit codes: 0 ok, 1 failure, 2 usage, 3 not running, 75 locked by another process, 78 bad configuration,
            130 interrupted, of commands that do not train"""


def main(argv: list[str]) -> int:
    args = _parse(argv)
    flags = {"model.base_model": args.base_model, "log.format": args.log_format}
    return exit_code("daemon.py", lambda: _do(args, find_home(args.home), flags))


def _do(args: argparse.Namespace, home: Home, flags: dict[str, Any]) -> int:
    """Imports stand where they are needed: status must answer at once, and only run needs it all."""
    match args.command:
        case "run":
            from longrun import compose

            return compose.run(home, flags, drain=args.drain)
        case "demo":
            from longrun import demo

            return demo.run(args.home)
        case "doctor":
            from longrun import doctor

            return doctor.run(home, flags)
        case _:
            return _operate(args, home, flags)


def _operate(args: argparse.Namespace, home: Home, flags: dict[str, Any]) -> int:
    from longrun import commands

    operator_commands: dict[str, Callable[[], int]] = {
        "status": lambda: commands.show_status(home, as_json=args.json),
        "pause": lambda: commands.pause(home),
        "resume": lambda: commands.resume(home),
        "stop": lambda: commands.stop(home, now=args.now),
        "skip": lambda: commands.skip(home),
        "missing": lambda: commands.show_missing(home, as_json=args.json),
        "retry": lambda: commands.retry_missing(home) if args.missing else commands.retry(home, args.names),
        "reset": lambda: commands.reset(home, flags, yes=args.yes),
        "put": lambda: commands.put(home, args.files),
        "check": lambda: commands.check(home, args.file, flags),
        "logs": lambda: commands.logs(home, follow=args.follow),
    }
    return operator_commands[args.command]()


def _parse(argv: list[str]) -> argparse.Namespace:
    """`daemon.py --home X --drain` means `daemon.py run --home X --drain`; --home may stand on either side."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--home", help="folder of inbox, model and history (default: LONGRUN_HOME, or here)")
    shared.add_argument("--base-model", metavar="M", help="tiny, a folder, or a hub name; for a model that begins")
    shared.add_argument("--log-format", choices=("text", "json"), help="of stderr and logs/daemon.log")
    before, rest = shared.parse_known_args(argv)
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help", "--version")):
        rest = ["run", *rest]
    args = _parser(shared).parse_args(rest)
    for name, value in vars(before).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def _parser(shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="daemon.py",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"Longrun {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:  # noqa: A002
        return commands.add_parser(name, parents=[shared], help=help, description=help)

    command("run", "watch inbox/ and train what arrives").add_argument(
        "--drain",
        action="store_true",
        help="leave when inbox and queue are empty: 1 when files were rejected or cannot be trained now, else 0",
    )
    command("status", "what the daemon is doing").add_argument("--json", action="store_true")
    command("pause", "stop training at the next step boundary, after a checkpoint, until resume")
    command("resume", "go on after pause")
    command("stop", "make the daemon leave after a checkpoint").add_argument(
        "--now", action="store_true", help="without a checkpoint: the steps since the last one are done again"
    )
    command("skip", "end the training of the running file only")
    command("missing", "list what was trained here and is not in the model, as after a restore").add_argument(
        "--json", action="store_true"
    )
    again = command("retry", "drop a rejected (or trained) file again, or train all that is missing")
    what = again.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help="files in rejected/ or trained/: each trains as a new job"
    )
    what.add_argument(
        "--missing", action="store_true", help="what was trained here and is not in the model, in its old order"
    )
    command("reset", "back the model up, verified, and begin anew").add_argument(
        "--yes", action="store_true", help="do not ask"
    )
    command("put", "copy files into the inbox, each appearing there whole").add_argument(
        "files", nargs="+", type=Path, metavar="FILE"
    )
    command("check", "say whether a file is good, and what it would train for").add_argument("file", type=Path)
    command("logs", "show the end of the log").add_argument("-f", "--follow", action="store_true")
    command("demo", "see it work in a scratch folder (or in --home)")
    command("doctor", "look for what could keep training from working")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
