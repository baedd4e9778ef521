"""`optimum-cli finetune lopt ...`: the words that follow are those of `lopt-edge finetune`.

optimum-cli finds its sub-commands as files of the namespace `optimum.commands.register` (optimum 2.3,
commands/optimum_cli.py). The rule: this file lies in a distribution of its own, since whoever has lopt-edge without optimum
shall not find a package of that name. Nothing of lopt-edge is imported before the command runs.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LoptCommand(BaseOptimumCLICommand):
    """The command `finetune lopt`."""

    COMMAND = CommandInfo("lopt", help="fine-tune a model within a memory budget (lopt-edge)")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all words as they are; lopt-edge knows them, --help too."""
        parser.prefix_chars = "\0"  # else argparse refuses the first word that begins with a dash
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        """Do what `lopt-edge finetune` does, and exit with its code."""
        from lopt_edge.cli.main import main

        sys.argv = ["lopt-edge", "finetune", *self.args.words]
        main()


class FinetuneCommand(BaseOptimumCLICommand):
    """The command `finetune`, which has one sub-command here."""

    COMMAND = CommandInfo("finetune", help="fine-tune a model")
    SUBCOMMANDS = (CommandInfo("lopt", help=LoptCommand.COMMAND.help, subcommand_class=LoptCommand),)


REGISTER_COMMANDS = [FinetuneCommand]
