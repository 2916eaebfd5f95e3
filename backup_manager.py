#!/usr/bin/env python3
"""Backups of a model that one can bet the model on: exit code 0 means durable, complete and verified.

python3 backup_manager.py backup current_model/ --type pre_recovery   before you delete or replace a model
python3 backup_manager.py list                                        what there is
python3 backup_manager.py restore latest                              put it back; what was there is kept
python3 backup_manager.py verify                                      read every byte of every backup

Needs nothing but Python: it works with the daemon running, stopped, or not installed.
"""

from __future__ import annotations

import argparse
import sys

from longrun import backup_commands as commands
from longrun.errors import exit_code
from longrun.manifest import BackupType

EXIT_CODES = """\
exit codes: 0 ok, 1 failure, 2 usage, 75 locked by another process, 78 bad configuration,
            130 interrupted by Ctrl-C"""


def main(argv: list[str]) -> int:
    # Not set_defaults: it would set those of the options that parser and commands share.
    args = _parser().parse_args(argv, argparse.Namespace(home=None, store=None, json=False))
    return exit_code("backup_manager.py", lambda: commands.do(args))


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    for_home = "the home that model and settings are of (default: LONGRUN_HOME, or here)"
    shared.add_argument("--home", default=argparse.SUPPRESS, help=for_home)
    shared.add_argument("--store", default=argparse.SUPPRESS, help="where backups are kept (default: HOME/backups)")
    shared.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="say it for machines")
    parser = argparse.ArgumentParser(
        prog="backup_manager.py",
        parents=[shared],
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str, example: str) -> argparse.ArgumentParser:  # noqa: A002
        return subparsers.add_parser(
            name,
            parents=[shared],
            help=help,
            description=help,
            epilog=f"example: python3 backup_manager.py {name} {example}",
        )

    types = [str(kind) for kind in BackupType]
    backup = command("backup", "back up a model folder", "current_model/ --type pre_recovery --reason 'bad file'")
    backup.add_argument("source", nargs="?", metavar="SOURCE", help="default: current_model/ of the home")
    backup.add_argument("--type", choices=types, default=str(BackupType.MANUAL))
    backup.add_argument("--reason", default="", metavar="TEXT", help="why, for the list")
    backup.add_argument("--follow", action="store_true", help="store what links to places outside lead to")

    listing = command("list", "show the backups, oldest first", "--type manual")
    listing.add_argument("--type", choices=types)

    verify = command("verify", "look for damage, in every byte of all backups or of one", "latest")
    verify.add_argument("id", nargs="?", metavar="ID", help="an id, the beginning of one, or latest")
    verify.add_argument("--quick", action="store_true", help="manifests and sizes only")

    restore = command("restore", "put a backup in the place of a folder, which is kept beside it", "latest")
    restore.add_argument("id", metavar="ID", help="an id, the beginning of one, or latest")
    restore.add_argument("target", nargs="?", metavar="TARGET", help="default: current_model/ of the home")
    restore.add_argument("--when-idle", action="store_true", help="wait until no file is being trained")

    prune = command("prune", "remove what retention does not keep; without --execute only say what", "--execute")
    prune.add_argument("ids", nargs="*", metavar="ID", help="remove these instead, of whatever type")
    prune.add_argument("--execute", action="store_true", help="do it")

    export = command("export", "copy a backup out of the store", "latest model.tar.zst")
    export.add_argument("id", metavar="ID", help="an id, the beginning of one, or latest")
    export.add_argument("target", metavar="DIR|FILE.tar.zst|URL", help="a URL (s3://bucket/folder) holds a store too")

    bring = command("import", "bring a backup into the store, every byte checked", "model.tar.zst")
    bring.add_argument("source", metavar="DIR|FILE.tar.zst|URL")
    bring.add_argument("id", nargs="?", metavar="ID", help="of a URL: which one (default: latest)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
