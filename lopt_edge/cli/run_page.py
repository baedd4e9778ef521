"""`lopt-edge finetune` and `resume` on the screen: a run that is watched, and its result.

The rule: results go to stdout, everything on the way to stderr; what is shown is in the output folder's files. Torch is
imported behind a spinner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lopt_edge.cli.next_commands import next_commands
from lopt_edge.cli.progress import TerminalProgress
from lopt_edge.cli.terminal import err, out
from lopt_edge.config.settings import Config
from lopt_edge.training.pipeline.launch import torchrun_rank
from lopt_edge.training.session.replacement import sentences

if TYPE_CHECKING:
    from lopt_edge.training.finish import RunResult


def run(config: Config, *, verbose: bool) -> None:
    """Train, and show what is done and what came out."""
    progress = TerminalProgress(err, verbose=verbose)
    try:
        if not (torchrun_rank() or (0, 1))[0]:  # the ranks after the first are silent
            progress.phase("start")
        from lopt_edge.training.run import finetune

        result = finetune(config, progress)
    finally:
        progress.stop()
    if result is not None:
        print_result(result)
    elif config.dry_run:
        err.print("dry run: nothing was trained or written")


def print_result(result: RunResult) -> None:
    """Print what came out: losses before and after, peaks, samples, and where the adapter lies."""
    table = Table(title=f"{result.steps} steps in {sum(result.seconds.values()):.0f} s", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    labels = {"eval_loss": "held-out task loss", "retention_loss": "retention loss",
              "eval_rewards_margin": "held-out margin", "eval_rewards_accuracy": "held-out accuracy"}  # fmt: skip
    before, after = result.evaluation["before"], result.evaluation["after"]
    for name in (name for name in after if name in labels):
        tokens = f" ({result.scored_tokens[name]:,} tokens)" if name in result.scored_tokens else ""
        table.add_row(f"{labels[name]}{tokens}", f"{before[name]:.4f}" if name in before else "", f"{after[name]:.4f}")
    if not after:
        table.add_row("loss of the last step", "", f"{result.final_loss:.4f}")
    whole = "whole process" if result.n_processes == 1 else f"{result.n_processes} processes"
    whole = whole if result.ranks == 1 else f"the largest of {result.ranks} ranks"
    table.add_row(f"peak memory ({whole})", "", f"{result.peak_rss_bytes / 2**20:.0f} MiB")
    if result.peak_device_bytes != result.peak_rss_bytes:
        table.add_row("peak device memory", "", f"{result.peak_device_bytes / 2**20:.0f} MiB")
    out.print(table)
    for sentence in sentences(result.replacement, after):
        out.print(sentence, markup=False)
    if result.replacement:
        out.print(
            f"peft alone would put this adapter on the intact model; lopt-edge export {result.output} --merged DIR "
            "writes the model that was trained",
            markup=False,
        )
    for when, text in result.samples.items():
        out.print(f"sample {when}: {text}", markup=False)
    out.print(f"adapter: {result.output}", markup=False)
    for command in next_commands(result):
        out.print(command, markup=False)
