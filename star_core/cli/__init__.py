"""The command line: parses, calls, prints. Everything heavy is imported by the command run."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..allocator import keep_freed_memory
from .ablation import add_ablation, run_ablation
from .batching import add_batch, run_batch
from .benchmarking import add_benchmark, run_benchmark
from .comparing import add_compare, add_votes, run_compare, run_votes
from .dataset import add_dataset, run_dataset
from .degrading import add_degrade, run_degrade
from .files import (
    add_convert,
    add_download,
    add_info,
    add_manifest,
    run_convert,
    run_download,
    run_info,
    run_manifest,
)
from .measuring import add_bench, add_demo, add_verify, run_bench, run_demo, run_verify
from .metrics import (
    add_evaluate,
    add_metric_weights,
    add_protocol,
    run_evaluate,
    run_metric_weights,
    run_protocol,
)
from .plan import add_plan, run_plan
from .training import add_train, run_train
from .upscale import add_upscale, run_upscale

SUCCESS, USER_ERROR, INTERRUPTED = 0, 2, 130

_COMMANDS = (
    ("upscale", run_upscale, add_upscale, "restore and enlarge a video"),
    ("plan", run_plan, add_plan, "predict memory and work of a run, and fit it into memory"),
    ("batch", run_batch, add_batch, "restore many videos, on one machine or many"),
    ("demo", run_demo, add_demo, "restore the bundled clip and measure the result"),
    ("compare", run_compare, add_compare, "write a page that shows clips side by side"),
    ("benchmark", run_benchmark, add_benchmark, "measure several methods on public clips"),
    ("votes", run_votes, add_votes, "count the votes from such pages"),
    ("download", run_download, add_download, "fetch published model files from Hugging Face"),
    ("evaluate", run_evaluate, add_evaluate, "measure restored clips"),
    ("protocol", run_protocol, add_protocol, "evaluate as in the paper, on its test sets"),
    ("metric-weights", run_metric_weights, add_metric_weights, "fetch the weights of metrics"),
    ("info", run_info, add_info, "identify a model file"),
    ("convert", run_convert, add_convert, "write a checkpoint as safetensors"),
    ("verify", run_verify, add_verify, "replay test vectors of the reference implementation"),
    ("manifest", run_manifest, add_manifest, "print a network's keys and shapes as JSON"),
    ("bench", run_bench, add_bench, "measure the speed of this machine"),
    ("degrade", run_degrade, add_degrade, "downscale and degrade a clean video"),
    ("dataset", run_dataset, add_dataset, "cut a folder of videos into clips to train on"),
    ("train", run_train, add_train, "train a model"),
    ("ablation", run_ablation, add_ablation, "train and compare variants of LIEM and DF loss"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0 on success, 2 for user errors, 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    keep_freed_memory()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return args.run(args) or SUCCESS
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except MemoryError:
        reason = "not enough memory"
    except (ValueError, OSError) as error:
        # The library speaks of what its caller may allow, a person needs the option.
        reason = str(error).replace("allow overwriting", "add --overwrite")
    except RuntimeError as error:
        from ..memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        # Smaller tiles have been tried by then.
        reason = "not enough memory: try a smaller --chunk-frames or a smaller --scale"
    return _complain(f"error: {reason}", USER_ERROR)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(" ".join(message.split()) + "\n")
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    program = _Parser(prog="star-vsr", description="STAR video super-resolution.")
    program.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = program.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, run, add, text in _COMMANDS:
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        add(command)
        command.set_defaults(run=run)
    return program
