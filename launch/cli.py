"""Command line: parses the arguments of `msc`, calls the command, and turns errors into messages and exit codes.

Nothing heavy is imported before a command runs, so that `msc --help` answers at once. A user's mistake
ends with one line and exit code 2; anything else is a bug and shows its traceback.
"""

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msc.datasets.errors import FAILURE, INTERRUPTED, USER_ERROR
from msc.parallel.console import configure_logging

from . import commands

log = logging.getLogger(__name__)

Function = Callable[[argparse.Namespace], int | None]
Command = Callable[[str, Function, str], argparse.ArgumentParser]
REPEATABLE = {"train": "items", "plan": "items", "convert": "sources"}  # positionals that may also follow options
SUBMITTABLE = ("train", "convert", "evaluate", "sample", "export")  # what may follow `msc submit`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `msc` command line (default: the process's own). Returns the exit code."""
    configure_logging()
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        code = int(args.function(args) or 0)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        log.error(f"interrupted{f': {error}' if str(error) else ''}")
        code = INTERRUPTED
    except BrokenPipeError:  # `msc … | head`: the reader has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "traceback" not in args and is_user_error(error):
            named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            log.error(f"{named}{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error))
            of_other_ranks = isinstance(error, ConnectionError)  # no mistake of the user's
            code = FAILURE if of_other_ranks else getattr(error, "exit_code", USER_ERROR)
        else:
            traceback.print_exc()
            code = getattr(error, "exit_code", FAILURE)
    # Outside of the handler nothing references the frames of the error any more, nor they loader workers.
    try:
        sys.stderr.flush()
    except OSError:  # a log on a full disk; Python would flush once more at exit and change the exit code
        sys.stderr = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others learn of a failed rank when it ends; an orderly exit may wait for them instead. And a successful
        # rank may abort in it, as threads of torch are still running.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    return code


def is_user_error(error: BaseException) -> bool:
    """Whether an error's message is for the user: a ValueError of our own code, or the operating system's."""
    if not isinstance(error, ValueError):
        return isinstance(error, OSError)
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("msc.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments, with `function` to call and `argv` itself. A usage error exits with code 2."""
    parser, parsers = build_parser()
    # argparse takes positionals only in one piece; the pieces after options are in `rest`.
    args, rest = parser.parse_known_args(argv)
    if args.command == "submit":  # what is not an option of its own is the command to submit, by default `train`
        args.inner = parse(rest if rest and rest[0] in SUBMITTABLE else ["train", *rest])
        rest = []
    name = REPEATABLE.get(args.command)
    if name and not any(argument.startswith("-") for argument in rest):
        setattr(args, name, [*getattr(args, name), *rest])
    elif rest:
        parsers[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    args.argv = list(argv)
    return args


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `msc`, and those of its commands by name."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = argparse.ArgumentParser(
        prog="msc",
        description="Pretrain causal video diffusion transformers with multi-scale causal attention.",
        epilog="`msc COMMAND --help` describes the options of a command.",
        parents=[shared],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, function: Function, text: str) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}."
        parsers[name] = subparsers.add_parser(
            name, help=text, description=description, parents=[shared], allow_abbrev=False
        )
        parsers[name].set_defaults(function=function)
        return parsers[name]

    add_data_commands(command)
    add_training_commands(command)
    add_planning_commands(command)
    add_job_commands(command)
    add_model_commands(command)
    return parser, parsers


# Options have no defaults here: those of the function or dataclass that takes them apply (commands.options_for).


def add_data_commands(command: Command) -> None:
    parser = command("convert", commands.convert, "turn videos into shards for training")
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="video, folder, tar or list (.txt .csv .jsonl …)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add("--frames", type=positive, metavar="N", help="video frames of a clip")
    add(
        "--size",
        type=shape("HEIGHTxWIDTH", "256x448"),
        metavar="HxW",
        help="of the clips in pixels (default: near the videos')",
    )
    text = "a shape of clips, may be given several times: each video goes to the nearest"
    bucket = shape("FRAMESxHEIGHTxWIDTH", "32x256x448")
    add("--bucket", type=bucket, action="append", metavar="FRAMESxHxW", help=text)
    add("--fps", type=float, metavar="F", help="frames per second of the clips (as the videos)")
    add("--stride", type=positive, metavar="N", help="video frames between two clips' starts")
    add("--held-out", type=float, metavar="SHARE", help="kept from training: video ends, or short videos")
    add("--autoencoder", metavar="SPEC", help="pixels, haar[:TxHxW] or diffusers:FOLDER")
    add("--store", choices=("auto", "video", "latent"), help="what the shards hold")
    add("--workers", type=positive, metavar="N", help="processes that decode and encode")
    add("--clips-per-shard", type=positive, metavar="N")
    add("--text", metavar="DIR", help="text encoder of Hugging Face that captions go through")
    add("--scenes", type=float, nargs="?", const=27.0, metavar="X", help="no clip over a cut (27)")
    add("--min-brightness", type=float, metavar="X", help="leave out darker clips (0 to 1)")
    add("--min-motion", type=float, metavar="X", help="leave out more static clips (0 to 1)")
    add("--crop", choices=("centre", "random"), help="what is kept of frames of another shape")
    text = "per-frame signal in VIDEO.NAME.csv, may be given several times: NAME[,kind=…][,take=…][,shift=N]"
    add("--signal", dest="signals", action="append", metavar="NAME", help=text)
    add("--max-bad", type=float, metavar="SHARE", help="of videos that may be unreadable (0.2)")
    exclusive = parser.add_mutually_exclusive_group().add_argument
    exclusive("--part", type=part, metavar="I/N", help="convert part I of N, from 0; then --merge")
    exclusive("--merge", action="store_true", help="make the index once all parts are done")
    add("--overwrite", action="store_true", help="replace an earlier conversion in DIR")

    add = command("inspect", commands.inspect, "show the contents of a folder of shards").add_argument
    add("shards", type=Path, metavar="SHARDS", help="folder that `msc convert` wrote")
    add("--verify", action="store_true", help="read everything and compare the checksums")
    add("--picture", type=Path, metavar="FILE", help="contact sheet of a few clips (default: contact.png in SHARDS)")


def add_training_commands(command: Command) -> None:
    add = command("train", commands.train, "train a model, or resume training").add_argument
    text = "at most one configuration file, and single settings that override it"
    add("items", nargs="*", metavar="CONFIG.yaml|section.key=value", help=text)
    add("--preset", metavar="NAME", help="settings to start from")
    add("--run", type=Path, metavar="DIR", help="run folder (default: runs/ and that name)")
    add("--resume", action="store_true", help="continue from the run's newest checkpoint")
    add("--rollback", metavar="N|PATH", help="resume from that checkpoint (step or folder), without the clips after it")
    add("--again", action="store_true", help="go back with --rollback even if the run did so before")
    add("--processes", type=positive, metavar="N", help="ranks to start (default: one per GPU)")
    add("--plan", type=Path, metavar="FILE", help="of `msc plan --json`: warn when the run deviates from it")
    add("--dry-run", action="store_true", help="print the resolved settings, train nothing")

    add = command(
        "checkpoints", commands.checkpoints, "list the checkpoints of a run and whether they are complete"
    ).add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--verify", action="store_true", help="read all of them and compare checksums")


def add_planning_commands(command: Command) -> None:
    add = command("plan", commands.plan, "estimate time, memory and cost of a training run on given GPUs").add_argument
    add("items", nargs="*", metavar="CONFIG.yaml|PRESET|section.key=value", help="what to plan; settings named stay")
    add("--gpus", type=positive, required=True, metavar="N", help="number of GPUs")
    add("--kind", required=True, metavar="NAME", help="a100, h100, h200 or b200")
    add("--memory", type=float, metavar="GB", help="of a GPU, if not the data sheet's")
    add("--network", type=float, metavar="GB/s", help="per GPU out of its machine, if not the usual")
    add("--node", type=positive, metavar="N", help="GPUs in a machine (8)")
    add("--price", type=float, metavar="X", help="of a GPU hour, in any currency")
    add("--roll-out", type=positive, metavar="UNITS", help="also plan the generation of so many units")
    add("--steps", type=positive, metavar="N", help="denoising steps of the roll-out (16)")
    add("--json", type=Path, metavar="FILE", help="write the best plan for programs and `msc train --plan`")

    parser = command("sweep", commands.sweep, "train many runs that differ in their settings, or show their states")
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="what varies: grid, list, ladder (docs/scaling.md)")
    add("--out", type=Path, metavar="DIR", help="sweep folder (default: runs/ and the file's name)")
    add("--jobs", type=positive, metavar="N", help="runs at a time (default: 1; under Slurm all)")
    text = "local: here and now, the default; slurm: an array of jobs, with the options that follow"
    add("--cluster", choices=("local", "slurm"), default="local", help=text)
    add_job_options(add)
    exclusive = parser.add_mutually_exclusive_group().add_argument
    exclusive("--status", action="store_true", help="only print the states of the runs")
    exclusive("--dry-run", action="store_true", help="only print what would be run")

    add = command("fit", commands.fit, "fit a scaling law to the runs of a sweep, or to a table of losses").add_argument
    add("points", type=Path, metavar="SWEEP", help="sweep folder, or .csv .json .jsonl with N, D, L")
    add("--out", type=Path, metavar="DIR", help="for fit.json and the plots (default: the sweep folder)")
    add("--only", action="append", metavar="KEY=VALUE|NAME*", help="runs with that setting, or such names")
    add("--loss", choices=("held out", "train"), help="which loss of a sweep's runs (held out)")
    add("--hold-out", type=int, metavar="N", help="largest runs that are predicted, not fitted (1)")
    add("--compute", type=float, nargs="+", metavar="C", help="FLOPs to predict the best size and tokens for")
    add("--delta", type=float, metavar="X", help="Huber threshold on log loss (default: from the noise)")
    add("--draws", type=positive, metavar="N", help="of the bootstrap (500)")
    add("--tracking", metavar="URI", help='MLflow store, or "none"')


def add_job_commands(command: Command) -> None:
    parser = command("submit", commands.submit, "run a command as a Slurm job, or in the background here")
    add = parser.add_argument
    parser.usage = "msc submit [train|convert|evaluate|sample|export] ARGUMENTS [options]"
    text = "local: in the background of this machine; debug: here and now (default: slurm)"
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm", help=text)
    add_job_options(add)
    add("--parts", type=positive, metavar="N", help="of convert: an array of N jobs, then one that merges")

    add = command("status", commands.status, "show state, step, loss, speed and time left of runs").add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: those in runs/)")

    add = command("logs", commands.logs, "show what the last job of a run printed").add_argument
    add("run", type=Path, metavar="RUN", help="run folder, or folder of shards")
    add("--rank", type=int, metavar="R", help="of that rank, or part of a conversion")
    add("-f", "--follow", action="store_true", help="keep showing what is added")
    add("--lines", type=positive, default=50, metavar="N", help="the last N lines (50)")

    add = command("cancel", commands.cancel, "end the jobs of a run; training saves if time allows").add_argument
    add("run", type=Path, metavar="RUN", help="run folder, or folder of shards")


def add_model_commands(command: Command) -> None:
    add = command("evaluate", commands.evaluate, "measure runs on held-out clips: loss, roll-outs").add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="run folder")
    add("--weights", choices=("ema", "raw"), help="averaged or last weights (default: ema)")
    add("--clips", type=positive, metavar="N", help="at most that many clips (64)")
    add("--steps", type=positive, metavar="N", help="denoising steps of each unit in roll-outs (16)")
    add("--samples", type=positive, metavar="N", help="roll-outs of each clip (4)")
    add("--checkpoint", metavar="N|PATH", help="that one, by step or folder (default: the newest)")
    add("--against", type=Path, metavar="RUN", help="compare with another run on the same clips and noise")
    text = "network for Fréchet distances, .pt2 or TorchScript (it is a program: only run one that you trust)"
    add("--features", type=Path, metavar="FILE", help=text)

    parser = command("sample", commands.sample, "continue a video, or make one from nothing")
    add, exclusive = parser.add_argument, add_generation_options(parser)
    exclusive("--video", type=Path, metavar="FILE", help="continue this video")
    add("--prompt", action="append", metavar="TEXT", help="what to show, may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="text file with a prompt in every line")
    add("--text", type=Path, metavar="DIR", help="text encoder (default: the one of the shards)")
    add("--label", action="append", metavar="NAME|N", help="class, may be given several times")
    text = "signal of the new units: a file, or values as left:8,forward (may be given for several signals)"
    add("--signal", action="append", metavar="NAME=...", help=text)
    add("--signal-guidance", action="append", metavar="NAME=W", help="scale of guidance of a signal (1: none)")
    add("--count", type=positive, metavar="N", help="videos (default: one for each prompt or label)")
    add("--batch", type=positive, metavar="N", help="videos made at once (1)")
    add("--units", type=positive, metavar="N", help="units to generate")
    add("--reach", type=positive, metavar="N", help="limit the context to the last N units (default: all)")
    add("--steps", type=positive, metavar="N", help="denoising steps for each unit (16)")
    add("--solver", choices=("euler", "heun"), help="heun: second order, twice the time (euler)")
    add("--guidance", type=float, metavar="W", help="scale of classifier-free guidance (1: none)")
    add("--out", type=Path, metavar="DIR", help="default: samples/ in the run folder")

    parser = command("play", commands.play, "steer a model in the browser, as it generates")
    add = parser.add_argument
    add_generation_options(parser)
    add("--reach", type=positive, metavar="N", help="units of the past that count (default: a training clip)")
    add("--steps", type=positive, metavar="N", help="denoising steps for each unit (8)")
    add("--host", metavar="ADDRESS", help="address to serve at (127.0.0.1: this machine only)")
    add("--port", type=int, metavar="PORT", help="8765")
    add("--token", metavar="TEXT", help="last part of the page's address (default: random)")

    add = command("export", commands.export, "write a run's weights as a folder of its own").add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--out", type=Path, metavar="DIR", help="default: export/ in the run folder")
    add("--weights", choices=("ema", "raw", "both"), help="averaged or last weights (default: ema)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="what they are stored in (fp32)")
    add("--max-shard-size", type=bytes_of, metavar="SIZE", help="of a file, such as 5GB (the default)")
    add("--layout", choices=("msc", "diffusers"), help="diffusers: as diffusers' own class of a published model (msc)")
    add("--checkpoint", metavar="N|PATH", help="step or folder (default: the newest)")
    add("--push-to-hub", metavar="REPO", help="upload it to the Hugging Face Hub; new ones are private")

    add = command("doctor", commands.doctor, "check this machine, with a fix for each problem").add_argument
    add("--json", action="store_true", help="as JSON, with the report of torch.utils.collect_env")


def add_generation_options(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """What `sample` and `play` have in common; the function adds another start that excludes these."""
    add, exclusive = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--weights", choices=("ema", "raw"), help="averaged or last weights (default: ema)")
    exclusive("--clip", type=int, metavar="K", help="continue held-out clip K (default: 0)")
    exclusive("--nothing", action="store_true", help="start without any context")
    add("--context", type=positive, metavar="N", help="units of context to start from (default: about half a clip)")
    add("--context-level", type=float, metavar="T", help="noise level at which the past is seen (0)")
    add("--seed", type=int, metavar="S")
    return exclusive


def add_job_options(add: Callable[..., Any]) -> None:
    """The fields of JobRequest."""
    add("--nodes", type=positive, metavar="N", help="nodes (default: 1)")
    add("--gpus-per-node", type=positive, metavar="G", help="GPUs of each node, a rank for each")
    add("--tasks-per-node", type=positive, metavar="N", help="ranks of each node, if not one per GPU")
    add("--cpus-per-task", type=positive, metavar="N", help="cores of each rank")
    for name, text in (("partition", "P"), ("account", "A"), ("qos", "Q"), ("constraint", "C"), ("mem", "SIZE")):
        add(f"--{name}", metavar=text, help="as sbatch takes it")
    add("--time", metavar="T", help="limit: minutes, H:MM:SS or D-HH:MM:SS")
    add("--site", type=Path, metavar="FILE", help="settings for all jobs (~/.config/msc/site.yaml)")


class Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version  # 30 ms that only this option needs

        print(f"msc {version('msc-video')}")
        parser.exit()


def positive(text: str) -> int:
    """A whole number of at least 1. argparse turns the ValueError into its message."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def bytes_of(text: str) -> int:
    """`5GB` or `200MB` as bytes, in powers of 1000 as file sizes are."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B)", text.strip().upper())
    if not size or not float(size[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 200MB")
    return int(float(size[1]) * 1000 ** (1 + "KMGT".index(size[2][0])))


def part(text: str) -> tuple[int, int]:
    """`I/N` as (I, N)."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(number), int(parts)


def shape(form: str, example: str) -> Callable[[str], tuple[int, ...]]:
    """A type of positive numbers with an x between: `16x24` as (16, 24)."""

    def parse_shape(text: str) -> tuple[int, ...]:
        numbers = text.lower().split("x")
        if len(numbers) != len(form.split("x")) or not all(number.isdecimal() for number in numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}, such as {example}")
        return tuple(map(positive, numbers))

    return parse_shape
