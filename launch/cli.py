"""The `msc` command line: its words, and what becomes of errors.

Nothing heavy is imported before a subcommand runs, so that `msc --help` answers at once. A user's mistake
ends with one line and exit code 2; anything else is a bug and shows its traceback.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from msc.parallel.console import configure_logging

from . import commands

LEFT_OVER = {"train": "items", "plan": "items", "convert": "sources"}  # positionals that may also follow options
SENDABLE = ("train", "convert", "evaluate", "sample", "export")  # what may follow `msc submit`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `msc` command line (default: the process's own). Returns the exit code."""
    configure_logging()
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        code = int(args.function(args))
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"msc: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `msc … | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "traceback" not in args and is_users(error):
            print(f"msc: {message(error)}", file=sys.stderr)
            of_others = isinstance(error, ConnectionError)  # of other ranks: no mistake of the user's
            code = 1 if of_others else getattr(error, "exit_code", 2)
        else:
            traceback.print_exc()
            code = getattr(error, "exit_code", 1)
    # Outside of the handler nothing holds on to the frames of the error any more, nor they to loader workers.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others learn of a failed rank when it ends; an orderly exit may wait for them instead. And one that ended
        # well may abort in it, as threads of torch's are still there.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_users(error: BaseException) -> bool:
    """Whether an error speaks to the user: a ValueError of our own code, or the operating system's."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError):
        return False
    innermost: TracebackType | None = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    module = innermost.tb_frame.f_globals.get("__name__", "") if innermost is not None else ""
    return bool(module.startswith("msc."))


def message(error: BaseException) -> str:
    """`FILE: No such file or directory` for the system's errors, our own words for ours."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with `function` to call and `argv` as given. A usage error exits by itself."""
    parser, parsers = build_parser()
    # argparse takes positionals only in one piece; the pieces after options come back here.
    args, left = parser.parse_known_args(argv)
    if args.command == "submit":  # what is not an option of its own is the command to send, `train` unless it says
        args.inner = parse(left if left and left[0] in SENDABLE else ["train", *left])
        left = []
    name = LEFT_OVER.get(args.command)
    if name and left and not any(word.startswith("-") for word in left):
        setattr(args, name, [*getattr(args, name), *left])
    elif left:
        parsers[args.command].error(f"unrecognized arguments: {' '.join(left)}")
    args.argv = list(argv)
    return args


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error came from"
    )
    parser = argparse.ArgumentParser(
        prog="msc",
        description="Pretrain causal video diffusion transformers with multi-scale causal attention.",
        epilog="`msc COMMAND --help` tells more about each command.",
        parents=[shared],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        made = subparsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[shared],
            allow_abbrev=False,
        )
        made.set_defaults(function=function)
        parsers[name] = made
        return made

    new = command("convert", commands.convert, "turn videos into shards for training")
    new.add_argument("sources", nargs="+", metavar="SOURCE", help="video, folder, tar or list (.txt .csv .jsonl …)")
    new.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    new.add_argument("--frames", type=positive, metavar="N", help="video frames of a clip")
    new.add_argument("--size", type=size, metavar="HxW", help="height and width of the clips in pixels")
    bucket_help = "a shape of clips, may be given several times: each video goes to the nearest"
    new.add_argument("--bucket", type=bucket, action="append", metavar="FRAMESxHxW", help=bucket_help)
    new.add_argument("--fps", type=float, metavar="F", help="frames per second of the clips")
    new.add_argument("--stride", type=positive, metavar="N", help="video frames between two clips' starts")
    new.add_argument("--held-out", type=float, metavar="SHARE", help="kept from training: video ends, or short videos")
    new.add_argument("--autoencoder", metavar="SPEC", help="pixels, haar[:TxHxW] or diffusers:FOLDER")
    new.add_argument("--store", choices=("auto", "video", "latent"), help="what the shards hold")
    new.add_argument("--workers", type=positive, metavar="N", help="processes that decode and encode")
    new.add_argument("--clips-per-shard", type=positive, metavar="N")
    new.add_argument("--text", metavar="DIR", help="text encoder of Hugging Face that captions go through")
    new.add_argument("--scenes", type=float, nargs="?", const=27.0, metavar="X", help="no clip over a cut (27)")
    new.add_argument("--min-brightness", type=float, metavar="X", help="leave out darker clips (0 to 1)")
    new.add_argument("--min-motion", type=float, metavar="X", help="leave out more static clips (0 to 1)")
    new.add_argument("--crop", choices=("centre", "random"), help="what is kept of frames of another shape")
    new.add_argument("--max-bad", type=float, metavar="SHARE", help="of videos that may be broken (0.2)")
    who = new.add_mutually_exclusive_group()
    who.add_argument("--part", type=part, metavar="I/N", help="convert part I of N, from 0; then --merge")
    who.add_argument("--merge", action="store_true", help="make the index once all parts are done")
    new.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in DIR")

    new = command("inspect", commands.inspect, "say what is inside a folder of shards")
    new.add_argument("shards", type=Path, metavar="SHARDS", help="folder that `msc convert` wrote")
    new.add_argument("--verify", action="store_true", help="read everything and compare the checksums")
    new.add_argument("--picture", type=Path, metavar="FILE", help="a few of the clips (default: contact.png in SHARDS)")

    new = command("train", commands.train, "train a model, or resume training")
    new.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG.yaml|section.key=value",
        help="at most one configuration file, and single settings that go over it",
    )
    new.add_argument("--preset", metavar="NAME", help="settings to start from")
    new.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/ and that name)")
    new.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    new.add_argument(
        "--rollback", metavar="N|PATH", help="resume from that checkpoint (step or folder), without the clips after it"
    )
    new.add_argument("--again", action="store_true", help="go back with --rollback even if the run did so before")
    new.add_argument("--processes", type=positive, metavar="N", help="ranks to start (default: one per GPU)")
    new.add_argument("--plan", type=Path, metavar="FILE", help="of `msc plan --json`: say when the run is off it")
    new.add_argument("--dry-run", action="store_true", help="print the resolved settings, train nothing")

    new = command("plan", commands.plan, "say what a training run would take on given GPUs, before it is started")
    new.add_argument(
        "items", nargs="*", metavar="CONFIG.yaml|PRESET|section.key=value", help="what to plan; settings named stay"
    )
    new.add_argument("--gpus", type=positive, required=True, metavar="N", help="how many")
    new.add_argument("--kind", required=True, metavar="NAME", help="a100, h100, h200 or b200")
    new.add_argument("--memory", type=float, metavar="GB", help="of a GPU, if not the data sheet's")
    new.add_argument("--network", type=float, metavar="GB/s", help="per GPU out of its machine, if not the usual")
    new.add_argument("--node", type=positive, metavar="N", help="GPUs in a machine (8)")
    new.add_argument("--price", type=float, metavar="X", help="of a GPU hour, in any currency")
    new.add_argument("--roll-out", type=positive, metavar="UNITS", help="also plan the generation of so many units")
    new.add_argument("--steps", type=positive, metavar="N", help="denoising steps of the roll-out (16)")
    new.add_argument("--json", type=Path, metavar="FILE", help="write the best way for programs and `msc train --plan`")

    new = command("sweep", commands.sweep, "train many runs that differ in their settings, or say where they are")
    new.add_argument("file", type=Path, metavar="FILE", help="what varies: grid, list, ladder (docs/scaling.md)")
    new.add_argument("--out", type=Path, metavar="DIR", help="sweep folder (default: runs/ and the file's name)")
    new.add_argument("--jobs", type=positive, metavar="N", help="runs at a time (default: 1; under Slurm all)")
    new.add_argument("--cluster", choices=("local", "slurm"), default="local", help="local: here and now, the default; "
                     "slurm: an array of jobs, with the options that follow")  # fmt: skip
    job_options(new)
    what = new.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="only print where the runs are")
    what.add_argument("--dry-run", action="store_true", help="only print what would be run")

    new = command("fit", commands.fit, "fit a scaling law to the runs of a sweep, or to a table of losses")
    new.add_argument("points", type=Path, metavar="SWEEP", help="sweep folder, or .csv .json .jsonl with N, D, L")
    new.add_argument("--out", type=Path, metavar="DIR", help="for fit.json and the plots (default: the sweep folder)")
    new.add_argument("--only", action="append", metavar="KEY=VALUE|NAME*", help="runs with that setting, or such names")
    new.add_argument("--loss", choices=("held out", "train"), help="which loss of a sweep's runs (held out)")
    new.add_argument("--hold-out", type=int, metavar="N", help="largest runs that are predicted, not fitted (1)")
    new.add_argument("--compute", type=float, nargs="+", metavar="C", help="FLOPs to say the best size and tokens for")
    new.add_argument("--delta", type=float, metavar="X", help="Huber threshold on log loss (default: from the noise)")
    new.add_argument("--draws", type=positive, metavar="N", help="of the bootstrap (500)")
    new.add_argument("--tracking", metavar="URI", help='MLflow store, or "none"')

    new = command("submit", commands.submit, "send msc train, convert or evaluate to Slurm, or to the background here")
    new.usage = "msc submit [train|convert|evaluate|sample|export] WORDS OF THAT COMMAND [options]"
    new.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="local: in the background "
                     "of this machine; debug: here and now (default: slurm)")  # fmt: skip
    job_options(new)
    new.add_argument("--parts", type=positive, metavar="N", help="of convert: an array of N jobs, then one that merges")

    new = command("status", commands.status, "say how runs are doing: state, step, loss, speed, time left")
    new.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: those in runs/)")

    new = command("logs", commands.logs, "show what the last job of a run printed")
    new.add_argument("run", type=Path, metavar="RUN", help="run folder, or folder of shards")
    new.add_argument("--rank", type=int, metavar="R", help="of that rank, or part of a conversion")
    new.add_argument("-f", "--follow", action="store_true", help="go on showing what is added")
    new.add_argument("--lines", type=positive, default=50, metavar="N", help="the last N lines (50)")

    new = command("cancel", commands.cancel, "end the jobs of a run; what is trained so far is saved if time allows")
    new.add_argument("run", type=Path, metavar="RUN", help="run folder, or folder of shards")

    new = command("checkpoints", commands.checkpoints, "list the checkpoints of a run, and whether they are whole")
    new.add_argument("run", type=Path, metavar="RUN", help="run folder")
    new.add_argument("--verify", action="store_true", help="read all of them and compare checksums")

    new = run_command(command("evaluate", commands.evaluate, "measure runs on held-out clips: loss, roll-outs"), "+")
    new.add_argument("--clips", type=positive, metavar="N", help="at most that many clips (64)")
    new.add_argument("--steps", type=positive, metavar="N", help="denoising steps of each unit in roll-outs (16)")
    new.add_argument("--samples", type=positive, metavar="N", help="roll-outs of each clip (4)")
    new.add_argument("--checkpoint", metavar="N|PATH", help="that one, by step or folder (default: the newest)")
    new.add_argument("--against", type=Path, metavar="RUN", help="compare with another run on the same clips and noise")
    new.add_argument("--features", type=Path, metavar="FILE", help="network for Fréchet distances, .pt2 or TorchScript "
                     "(it is a program: only run one that you trust)")  # fmt: skip

    new = run_command(command("sample", commands.sample, "continue a video, or make one from nothing"))
    start = new.add_mutually_exclusive_group()
    start.add_argument("--video", type=Path, metavar="FILE", help="continue this video")
    start.add_argument("--clip", type=int, metavar="K", help="continue held-out clip K (default: 0)")
    start.add_argument("--nothing", action="store_true", help="start without any context")
    new.add_argument("--prompt", action="append", metavar="TEXT", help="what to show, may be given several times")
    new.add_argument("--prompts", type=Path, metavar="FILE", help="text file with a prompt in every line")
    new.add_argument("--text", type=Path, metavar="DIR", help="text encoder (default: the one of the shards)")
    new.add_argument("--label", action="append", metavar="NAME|N", help="class, may be given several times")
    new.add_argument("--count", type=positive, metavar="N", help="videos (default: one for each prompt or label)")
    new.add_argument("--batch", type=positive, metavar="N", help="videos made at once (1)")
    new.add_argument("--units", type=positive, metavar="N", help="units to generate")
    new.add_argument("--context", type=positive, metavar="N", help="units of context to start from")
    new.add_argument("--context-level", type=float, metavar="T", help="noise level at which the past is seen (0)")
    new.add_argument("--reach", type=positive, metavar="N", help="see at most N units back (default: all)")
    new.add_argument("--steps", type=positive, metavar="N", help="denoising steps for each unit (16)")
    new.add_argument("--solver", choices=("euler", "heun"), help="heun: second order, twice the time (euler)")
    new.add_argument("--guidance", type=float, metavar="W", help="scale of classifier-free guidance (1: none)")
    new.add_argument("--seed", type=int, metavar="S")
    new.add_argument("--out", type=Path, metavar="DIR", help="default: samples/ in the run folder")

    new = command("export", commands.export, "write a run's weights in a form that needs nothing of the run folder")
    new.add_argument("run", type=Path, metavar="RUN", help="run folder")
    new.add_argument("--out", type=Path, metavar="DIR", help="default: export/ in the run folder")
    new.add_argument("--weights", choices=("ema", "raw", "both"), help="averaged or last weights (default: ema)")
    new.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="what they are stored in (fp32)")
    new.add_argument("--max-shard-size", type=bytes_of, metavar="SIZE", help="of a file, such as 5GB (the default)")
    new.add_argument("--checkpoint", metavar="N|PATH", help="step or folder (default: the newest)")
    new.add_argument("--push-to-hub", metavar="REPO", help="upload it to the Hugging Face Hub; new ones are private")

    new = command("doctor", commands.doctor, "say what is wrong with this machine, and how to put it right")
    new.add_argument("--json", action="store_true", help="the same for programs")
    return parser, parsers


def job_options(new: argparse.ArgumentParser) -> None:
    """What each job is to get."""
    new.add_argument("--nodes", type=positive, metavar="N", help="nodes (default: 1)")
    new.add_argument("--gpus-per-node", type=positive, metavar="G", help="GPUs of each node, a rank for each")
    new.add_argument("--tasks-per-node", type=positive, metavar="N", help="ranks of each node, if not one per GPU")
    new.add_argument("--cpus-per-task", type=positive, metavar="N", help="cores of each rank")
    for name, text in (("partition", "P"), ("account", "A"), ("qos", "Q"), ("constraint", "C"), ("mem", "SIZE")):
        new.add_argument(f"--{name}", metavar=text, help="as sbatch takes it")
    new.add_argument("--time", metavar="T", help="limit: minutes, H:MM:SS or D-HH:MM:SS")
    new.add_argument("--site", type=Path, metavar="FILE", help="settings for all jobs (~/.config/msc/site.yaml)")


def run_command(parser: argparse.ArgumentParser, many: str | None = None) -> argparse.ArgumentParser:
    parser.add_argument("run", type=Path, nargs=many, metavar="RUN", help="run folder")
    parser.add_argument("--weights", choices=("ema", "raw"), help="averaged or last weights (default: ema)")
    return parser


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
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B)", text.strip().upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 200MB")
    return int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2][0])))


def part(text: str) -> tuple[int, int]:
    """`I/N` as (I, N)."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(number), int(parts)


def bucket(text: str) -> tuple[int, int, int]:
    """`FRAMESxHxW` as (frames, height, width)."""
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 32x256x448")
    return positive(numbers[0]), positive(numbers[1]), positive(numbers[2])


def size(text: str) -> tuple[int, int]:
    """`HxW` as (height, width)."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, such as 256x448")
    return positive(height), positive(width)
