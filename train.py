#!/usr/bin/env python3
"""Train files by hand, with the same plan, ledger and checkpoints as the daemon.

    python train.py FILE...            train these files now, one after another
    python train.py --plan FILE...     only say how many steps each would train for

A file is copied, trained to its end, and its copy kept in trained/. After Ctrl-C the same command goes on where
it stopped. Refuses while a daemon holds the home: drop the file into inbox/ instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longrun.errors import ExitCode, exit_code
from longrun.home import Home, find_home


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    return exit_code("train.py", lambda: _do(args, find_home(args.home)))


def _do(args: argparse.Namespace, home: Home) -> int:
    if args.worker or args.preparer:
        from longrun.training import serve

        if args.worker:
            serve.worker(home, args.worker, args.options)
        else:
            serve.preparer(args.preparer)
    elif args.check_base or args.device:
        from longrun.training import base_model

        if args.check_base:
            base_model.check(args.check_base)
        else:
            print(base_model.find_device(**json.loads(args.options)))
    else:
        return _by_hand(args, home)
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSONL files, in the order of training")
    parser.add_argument("--home", help="folder of the model and its history (default: LONGRUN_HOME, or here)")
    parser.add_argument("--base-model", help="tiny, a folder, or a hub name; only for a model that begins")
    parser.add_argument("--plan", action="store_true", help="say the plan and stop")
    # How the daemon starts its two children, and asks what only torch can tell.
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--preparer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    parser.add_argument("--check-base", help=argparse.SUPPRESS)
    parser.add_argument("--device", action="store_true", help=argparse.SUPPRESS)
    return parser


def _by_hand(args: argparse.Namespace, home: Home) -> int:
    from longrun import archive, compose

    if not args.files:
        print("train.py: name at least one FILE, or see --help", file=sys.stderr)
        return ExitCode.USAGE
    for file in args.files:
        archive.check_accepted(file, "train")
    flags = {"model.base_model": args.base_model}
    if args.plan:
        from longrun.training.say_plan import say_plan

        return say_plan(home, args.files, flags)
    return compose.run(home, flags, by_hand=args.files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
