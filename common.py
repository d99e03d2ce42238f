"""What no reader of a paper would look for, shared by the method files. No loss, head, queue or training loop is here.

In the order in which a method's `main` meets it:

    command line    Flags, parse_args, warn, refuse, abort
    the run         Run, and its parts: RunFolder (checkpoints, signals), Log (metrics, console), Judge (online kNN)
    processes       start_processes, all_gather, my_rows, SyncBatchNorm, distribute, full_precision
    images          Data, Crop, load_data: folders, torchvision's datasets, decoding by workers, procedural textures
    networks        backbone, read_weights; LARS, LARC, cosine_schedule
    batches         Draws, View, Batch, batches: who sees which images, with which random numbers
    augmentation    resized_crop, color_jitter, grayscale, random_blur, solarize, normalize: batched, drawn per image
    neighbours      knn_scores, embedding_health

Copy what you need: docs/pieces.md lists what each piece needs.
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import secrets
import shlex
import signal
import sys
import threading
import time
import typing
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---------------------------------------------------------------------------------------------- command line


def tell(message: str, stream: Literal["stdout", "stderr"]) -> None:
    """Print a line. A closed pipe or a full disk behind the stream ends no run: the rest is left out."""
    if (file := getattr(sys, stream)) is None:  # it was closed from the start
        return
    try:
        print(message, file=file, flush=True)
    except (OSError, ValueError) as error:
        setattr(sys, stream, None)
        if stream == "stdout":
            warn(f"nothing more is printed, for the output cannot be written ({error})")


def warn(message: str, every_rank: bool = False, kind: str = "warning") -> None:
    """One line per machine, or from every rank that calls."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or int(os.environ.get("WORLD_SIZE", 1)) == 1
    if first or every_rank:
        if sys.stderr and not sys.stderr.closed and sys.stderr.isatty():
            kind = f"\033[{31 if 'error' in kind else 33}m{kind}\033[0m"  # red or yellow
        tell(f"{kind}: {' '.join(message.splitlines())}", "stderr")


def refuse(message: str, every_rank: bool = False) -> typing.NoReturn:
    """Answer a wrong use: one line per machine (or from the rank that alone saw it), exit code 2."""
    warn(message, every_rank, f"{Path(sys.argv[0]).name}: error")
    raise SystemExit(2)


def abort(message: str) -> typing.NoReturn:
    """End the run on a fault: one line per machine, exit code 1."""
    warn(message, kind="error")
    raise SystemExit(1)


def excepthook(kind: type, error: BaseException, traceback: Any) -> None:
    """In place of Python's: one line where memory ran out, from the rank that saw it; else the traceback."""
    lack = "out of memory|not enough memory|can't allocate memory|bad_alloc"  # of CUDA, Windows, Linux, C++
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(lack, str(error))):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        size = f" ({asked[1]} more were needed)" if asked else ""
        warn(f"out of memory{size}; lower --batch-size, --image-size, or the widths of the network", True, "error")
    else:
        sys.__excepthook__(kind, error, traceback)


@dataclass
class Flags:
    """The flags of every method. A method's `Args` shows the defaults that differ and adds its own flags."""

    recipe: Literal["quick", "cifar", "imagenet"] = "quick"  # a row of RECIPES; flags given by hand beat it
    dataset: Literal["patterns", "cifar10", "cifar100", "stl10", "folder"] = "patterns"  # --data-dir alone means folder
    data_dir: str = ""  # folder of images, unless torchvision keeps --dataset there, or the recipe's dataset
    image_size: int = 0  # side of the views in pixels; 0: that of the images, but 32 at least and 96 at most
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the channels, for normalisation
    std: tuple[float, float, float] = IMAGENET_STD  # of the channels, for normalisation
    arch: str = "resnet10"  # resnet10 (one block per stage) or any torchvision ResNet
    stem: Literal["imagenet", "small"] = "imagenet"  # small: 3x3 stride 1, no max-pooling, for 32-pixel images
    batch_size: int = 128  # images per step over all processes; the default shrinks to fit a smaller dataset
    epochs: int = 15  # passes over the training images
    max_steps: int = 0  # stop after so many steps of the schedule that --epochs sets; 0: do not
    train_limit: int = 0  # train on so many images, chosen at random; 0: all
    base_lr: float = 1.0  # learning rate at batch size 256, scaled linearly with it
    optimizer: Literal["lars", "larc", "sgd"] = "lars"  # momentum 0.9 in all; larc: a variant of LARS, see common.py
    weight_decay: float = 1e-6  # on which parameters: see `groups` in main
    warmup_epochs: float = 2  # linear warm-up of the learning rate from 0
    seed: int = 0  # of the initial weights, the order and every augmentation
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where that is fast
    compile: bool = False  # torch.compile the network
    workers: int = 2  # per process, for images that do not fit in memory
    full_decode: bool = False  # decode JPEGs at full size, not at 1/2, 1/4 or 1/8 where that will do: slower, sharper
    log_every: int = 10  # steps
    eval_every: int = 5  # epochs between online kNN evaluations
    save_every: int = 5  # epochs between checkpoints
    run_dir: str = ""  # where the run is kept; none: runs/<method>, then the flags that change the result
    overwrite: bool = False  # delete the run of that folder instead of continuing it
    init: str = ""  # start from this encoder.pt or run folder
    tensorboard: bool = False  # also write TensorBoard events
    crop_min_scale: float = 0.2  # smallest share of the area that a (large) crop keeps
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the papers' views, for large images


def parse_args(args_class: type, recipes: dict[str, dict[str, Any]] | None = None, argv: list[str] | None = None):
    """Fill the dataclass `args_class` from the command line.

    Field `batch_size` is flag `--batch-size`; a bool is `--flag/--no-flag`; a `Literal` lists its choices; a tuple has
    as many values as its default; a field without a default is positional. The help text is the comment behind the
    field. `recipes` maps the value of `--recipe` to other defaults. `--data-dir` alone means `--dataset folder`, unless
    torchvision keeps the recipe's dataset there. From here on, streams print any name and `excepthook` is Python's.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and the help may hold what the terminal has not
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = excepthook
    words = sys.argv[1:] if argv is None else argv
    named = re.findall(r"--recipe[= ](\S+)", " ".join(words))  # the help shows the defaults of the last one
    recipe = (recipes or {}).get(named[-1] if named else "quick", {})
    source = "".join(inspect.getsource(cls) for cls in reversed(args_class.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    doc, fields = sys.modules[args_class.__module__].__doc__ or "", dataclasses.fields(args_class)
    positional = [field.name for field in fields if field.default is dataclasses.MISSING]
    usage = " ".join(["%(prog)s", *positional, "[flags]"])
    parser = argparse.ArgumentParser(usage=usage, description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: refuse(f"{message} (see --help)")
    own, shared = (parser.add_argument_group(f"flags of {whose}") for whose in (parser.prog, "every method"))
    kinds, flags = typing.get_type_hints(args_class), []
    for field in fields:
        kind, text = kinds[field.name], comments.get(field.name, "").replace("%", "%%")
        if field.name in positional:
            parser.add_argument(field.name, type=kind, help=text)
            continue
        options: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            number = typing.get_args(kind)[0]
            options = {"type": number, "nargs": len(field.default), "metavar": number.__name__.upper()}
        default = recipe.get(field.name, field.default)
        default = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default == "" else default
        options |= {"dest": field.name, "default": argparse.SUPPRESS, "help": f"{text} [{default}]"}
        group = shared if hasattr(args_class.__base__, field.name) else own
        flags += group.add_argument(flag_of(field.name), **options).option_strings
    found, unknown = parser.parse_known_args(words)
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}{suggestion(unknown, flags)} (see --help)")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(found).items()}
    recipe = (recipes or {}).get(given.get("recipe", "quick"), {})
    if "data_dir" in given and "dataset" not in given:
        kept = getattr(torchvision.datasets, recipe.get("dataset", "").upper(), None)
        if not (kept and Path(given["data_dir"], kept.base_folder).is_dir()):
            given["dataset"] = "folder"
    return args_class(**{**recipe, **given})


def suggestion(unknown: list[str], flags: list[str]) -> str:
    """For words that are no flags: the flag that ends like the first of them, or that is spelled most like it."""
    word = next((word for word in unknown if word.startswith("-")), "").split("=")[0].lstrip("-").replace("_", "-")
    near = [flag for flag in flags if flag.endswith("-" + word)] or difflib.get_close_matches("--" + word, flags, 1)
    return f"; did you mean {near[0]}?" if word and near else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_least(args, least: float, *names: str, most: float = math.inf) -> None:
    """Refuse a flag of these that is under `least`, above `most`, or not a number."""
    limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
    for name in names:
        if not least <= getattr(args, name) <= most:
            refuse(f"{flag_of(name)} must be {limits}, not {getattr(args, name)}")


def check_widths(args, *names: str) -> None:
    """Refuse a flag of these that is no width of a layer: one layer of the largest widths has four gigabytes."""
    check_least(args, 1, *names, most=2**15)


def check_positive(args, *names: str) -> None:
    """Refuse a flag of these that is not positive."""
    for name in names:
        if not getattr(args, name) > 0:
            refuse(f"{flag_of(name)} must be positive, not {getattr(args, name)}")


def check_flags(args: Flags) -> None:
    """Refuse impossible values of the flags that all methods share."""
    check_shared(args)
    check_least(args, 1, "epochs", "log_every", "eval_every", "save_every")
    check_least(args, 0, "batch_size", "max_steps", "train_limit", "seed")
    check_least(args, 0, "warmup_epochs", "base_lr", "weight_decay")
    if args.dataset == "patterns" and args.data_dir:
        refuse("--dataset patterns is generated and takes no --data-dir; use --dataset folder for your own images")
    if min(args.std) < 1e-6:
        refuse(f"--std must be at least 1e-6, not {min(args.std)}")


def check_shared(args) -> None:
    """Refuse impossible values of flags that evaluate.py has, too, and numbers that no flag can have."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                refuse(f"{flag_of(field.name)} must be finite, not {number}")
            if isinstance(number, int | float) and abs(number) > 1e18:  # float32 holds the square
                refuse(f"{flag_of(field.name)} must be between -1e18 and 1e18, not {number}")
    check_least(args, 0, "image_size", most=4096)  # pixels; 64 such views have twelve gigabytes
    check_least(args, 0, "workers", most=256)
    if args.dataset == "folder" and not args.data_dir:
        refuse("--dataset folder needs --data-dir")
    if not 0 <= args.crop_min_scale <= 1:
        refuse(f"--crop-min-scale is a share of the area, from 0 to 1, not {args.crop_min_scale}")
    if args.precision == "fp16" and not torch.cuda.is_available():
        refuse("--precision fp16 needs a GPU; use fp32 or bf16 on a CPU")


# --------------------------------------------------------------------------------------------------- the run

# A run may be continued with other values of these flags (of --epochs, with a larger one: it stretches the schedule).
FREE_FLAGS = {"epochs", "max_steps", "workers", "log_every", "eval_every", "save_every"}
FREE_FLAGS |= {"run_dir", "data_dir", "overwrite", "tensorboard"}
RUN_FILES = ("args.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "encoder.pt", "heads.pt")
BANK_LIMIT = 50_000  # the online kNN compares with at most this many training images


class Run:
    """One training run. main calls, in this order: Run, place, start; in the loop batches, schedule, report; and close.
    A step counts finished updates, and 0 is the untrained network. All ranks call every method, rank 0 writes.
    """

    def __init__(self, method: str, args: Flags, recipes: dict[str, dict[str, Any]]):
        """Check the flags, join the other processes, load the images, seed torch. Nothing is written yet."""
        check_flags(args)
        run_dir = args.run_dir or default_run_dir(method, args, recipes)
        self.compute, self.scaler = compute_in(args.precision, start_processes())
        self.device, self.dtype, self.autocast = self.compute
        self.train, self.test = load_data(args.dataset, args.data_dir, args.train_limit, self.device)
        for data in filter(None, (self.train, self.test)):
            data.full_decode = args.full_decode
        batch_size, image_size = fit_batch_size(args, len(self.train)), args.image_size or usual_view(self.train)
        self.args = args = dataclasses.replace(args, run_dir=run_dir, batch_size=batch_size, image_size=image_size)
        torch.manual_seed(args.seed)
        self.steps_per_epoch = len(self.train) // batch_size
        self.total_steps = args.epochs * self.steps_per_epoch  # of the schedule
        self.warmup_steps = round(args.warmup_epochs * self.steps_per_epoch)
        self.first_step, self.last_step = 0, min(self.total_steps, args.max_steps or self.total_steps)
        self.folder = RunFolder(method, args, self.train.whole)
        self.log = Log(args, self.steps_per_epoch, self.last_step)
        self.judge = Judge(args.image_size, args.mean, args.std, self.compute, args.workers)
        labelled = self.train.rows_with("labels")
        even = torch.linspace(0, len(labelled) - 1, min(len(labelled), BANK_LIMIT)).long()
        self.bank = self.train if len(even) == len(self.train) else self.train.subset(labelled[even])

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, its backbone loaded from `--init`, every BatchNorm over the images of all ranks."""
        if self.args.init:
            load_encoder(model.backbone, self.args.init)
        return sync_batchnorm(model.to(self.device, self.dtype, memory_format=torch.channels_last), self.device)

    def start(self, encoder: nn.Module | None = None, **state: Any) -> None:
        """Open the run folder; go on from its checkpoint, if there is one; judge a network that is not yet trained.

        `state` names all that a run has to remember, by state_dict and load_state_dict, among them `model`. `encoder`
        is what is judged and kept in encoder.pt, by default model.backbone.
        """
        self.state = {**state, "scaler": self.scaler}
        self.encoder = encoder or state["model"].backbone
        self.folder.open()
        saved = self.folder.restore(self.state) or {"step": 0, "log_bytes": 0}
        self.first_step, self.began = saved["step"], time.perf_counter()
        self._say_what_is_trained()
        if self.first_step > 0:
            say(f"continuing after step {self.first_step} of {self.last_step}")
        if self.first_step >= self.last_step:
            say("this run is finished: --run-dir and more --epochs continue it, --overwrite starts it anew")
        self.log.open(self.first_step, saved["log_bytes"])
        for module in state.values() if self.args.compile else ():
            if isinstance(module, nn.Module):
                module.compile()
        if self.test and self.first_step == 0:
            self._evaluate(0)

    def _say_what_is_trained(self) -> None:
        args, train, test = self.args, self.train, self.test
        if args.warmup_epochs >= args.epochs:
            warn(f"--warmup-epochs {args.warmup_epochs:g} of --epochs {args.epochs}: the learning rate only rises")
        kept = "in memory" if train.pixels is not None else f"decoded by workers ({args.workers} per process)"
        split = f"of {len(train.classes)} classes; {len(test)} to test on" if test else "no labelled test split"
        source = f"{args.dataset} {args.data_dir}".strip()
        say(f"images   {source}: {len(train)} {kept}, {split}")
        world, threads, cuda = rank_and_world()[1], torch.get_num_threads(), self.device.type == "cuda"
        shares = f" = {world} x {args.batch_size // world}" * (world > 1)
        where = torch.cuda.get_device_name() if cuda else f"CPU, {threads} thread{'s' * (threads > 1)}"
        precision = args.precision if args.precision != "auto" else usual_precision(self.device)
        say(f"batch    {args.batch_size}{shares} on {where}, {precision}; base learning rate {args.base_lr:g}")
        stop = f"; --max-steps ends the run after {self.last_step}" * (self.last_step < self.total_steps)
        say(f"steps    {self.total_steps} = {args.epochs} epochs of {self.steps_per_epoch}{stop}")
        say(f"folder   {self.folder.path}")
        say("columns  spread of the embeddings: 1 isotropic, 0 a point; effective rank: dimensions they fill")

    def batches(
        self, crops: "list[Crop]", steps: range | None = None, neighbours: Tensor | None = None
    ) -> "Iterator[tuple[int, Batch]]":
        """(step, its batch) for every step that is left to take, or for `steps`; of `neighbours`, if they are given."""
        steps, args = range(self.first_step, self.last_step) if steps is None else steps, self.args
        how = (args.batch_size, args.seed, self.compute, args.workers, neighbours)
        return zip(steps, batches(self.train, crops, steps, *how), strict=True)

    def schedule(self, step: int, peak: float, final: float = 0.0) -> float:
        """Linear warm-up over `--warmup-epochs`, then a cosine over the rest of `--epochs`."""
        return cosine_schedule(step, self.total_steps, self.warmup_steps, peak, final)

    def report(self, step: int, loss: Tensor, terms: dict[str, Tensor], lr: float, z: Tensor) -> None:
        """After each step: log, judge and save where it is time to; end the run if a signal asked for it."""
        self.log.step(step, loss, terms, lr, z)
        if self.test and self._due(step, self.args.eval_every):
            self._evaluate(step)
        number = self.folder.signal_of_any_rank()
        if number or self._due(step, self.args.save_every):
            self._save(step)
        if number:
            name, but = signal.Signals(number).name, " without --overwrite" * self.args.overwrite
            say(f"{name}: saved after step {step}; the same command{but} continues")
            self.close()
            raise SystemExit(128 + number)

    def _due(self, step: int, epochs: int) -> bool:
        return step == self.last_step or step % (epochs * self.steps_per_epoch) == 0

    def _evaluate(self, step: int) -> None:
        self.log.check_finite()
        with self.log.pause():
            knn_top1 = self.judge.knn_top1(self.encoder, self.bank, self.test)
            self.log.write({"step": step, "knn_top1": knn_top1})
        say(f"{f'step {step}/{self.last_step}' if step else 'untrained network'}: online kNN {100 * knn_top1:.1f} %")

    def _save(self, step: int) -> None:
        self.log.check_finite()
        if not torch.stack(torch._foreach_norm(list(self.state["model"].parameters()))).isfinite().all():
            abort(f"step {step}: a weight is no longer finite; nothing was saved since it broke; lower --base-lr")
        with self.log.pause():
            on_rank_0(lambda: self.folder.save(step, self.encoder, self.state, self.log.bytes()))

    def close(self) -> dict[str, float]:
        """Hand back signals and the process group; return the latest value of every metric."""
        if rank_and_world()[0] == 0 and self.log.latest.get("step") == self.last_step:
            self._say_what_is_next()
        self.folder.close()
        self.log.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        return self.log.latest

    def _say_what_is_next(self) -> None:
        path, steps = self.folder.path, self.last_step - self.first_step
        first = json.loads(self.log.file.read_text().partition("\n")[0])  # of the untrained network, if it was judged
        knn = [f"{100 * line['knn_top1']:.1f} %" for line in (first, self.log.latest) if "knn_top1" in line]
        if steps > 0:
            gain = f"; online kNN from {knn[0]} (untrained) to {knn[1]}" if len(knn) == 2 else ""
            say(f"done     {steps} steps in {clock(time.perf_counter() - self.began)}{gain}")
        say(f"encoder  {path / 'encoder.pt'}")
        protocol, script = "linear" if self.test else "diagnose", Path(__file__).resolve().with_name("evaluate.py")
        say(f"next     {shlex.join(['python', os.path.relpath(script), str(path), '--protocol', protocol])}")
        if not self.test:
            say("         the other protocols need labels: --data-dir with train/<class>/* and val/<class>/*")


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def say(message: str) -> None:  # on the console, from rank 0
    if rank_and_world()[0] == 0:
        tell(message, "stdout")


def default_run_dir(method: str, args: Flags, recipes: dict[str, dict[str, Any]]) -> str:
    """runs/<method>, then every flag that differs from its recipe's value and changes the result; a slash is %2F."""
    args = dataclasses.replace(args, data_dir=args.data_dir and os.path.normpath(args.data_dir))
    usual = dataclasses.asdict(type(args)(**recipes[args.recipe])) | {"recipe": "quick"}
    if args.data_dir and args.dataset == "folder":
        usual["dataset"] = "folder"  # --data-dir says it
    unnamed = FREE_FLAGS - {"epochs", "max_steps", "data_dir"}
    named = {k: v for k, v in dataclasses.asdict(args).items() if v != usual[k] and k not in unnamed}
    parts = [f"{k}={'_'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in named.items()]
    return str(Path("runs", "-".join([method, *parts]).replace("%", "%25").replace(os.sep, "%2F")))


def fit_batch_size(args: Flags, images: int) -> int:
    """`--batch-size`, which is global. The default shrinks to a power of two that fits; another must fit."""
    world, most = rank_and_world()[1], 2 ** int(math.log2(images))
    if images < 2 * world:
        refuse(f"--data-dir holds {images} training images; at least {2 * world} are needed, two for every process")
    size = min(args.batch_size, most) if args.batch_size == type(args).batch_size else args.batch_size
    if size > images:
        refuse(f"--batch-size {size} is larger than the {images} training images; use {most}")
    if size % world:
        refuse(f"--batch-size {size} is not divisible by the {world} processes; it is the global batch size")
    if size < 2 * world:
        refuse(f"--batch-size {size} leaves fewer than two images per process, which BatchNorm needs; use {2 * world}")
    return size


def usual_view(data: "Data") -> int:
    """The side of the views where `--image-size` does not say it: 32, or 64 or 96 for images that are not smaller."""
    side = int(np.median([min(size) for size in data.sizes()]))
    size = max(size for size in (32, 64, 96) if size <= max(32, side))
    if side >= 96:
        say(f"images of about {side} pixels are seen at {size}; larger views: --image-size, --arch, --batch-size")
    return size


class RunFolder:
    """What a run leaves behind: args.json, checkpoint.pt, encoder.pt, heads.pt. Signals ask it to save once more.
    `dataset` says what the images are (`Data.whole`): a checkpoint is continued on the same ones only.
    """

    def __init__(self, method: str, args: Flags, dataset: dict[str, Any]):
        self.method, self.args, self.dataset, self.path = method, args, dataset, Path(args.run_dir)
        self.signal, self.handlers, self.saved_step, self.lock = 0, {}, 0, None

    def open(self) -> None:
        """Make and lock the folder, or refuse one that holds another run. From here on, signals are kept."""
        on_rank_0(self._write_flags)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self.handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        self.signal = number
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _write_flags(self) -> None:
        mine, file = {"method": self.method, **dataclasses.asdict(self.args)}, self.path / "args.json"
        mine = json.loads(json.dumps(mine))
        overwrite = self.args.overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0
        try:
            there = {entry.name for entry in self.path.iterdir()} - {"lock"} if self.path.is_dir() else set()
            if overwrite and there and file.name not in there:
                refuse(f"--overwrite: {self.path} holds no run, so nothing in it was deleted; take another --run-dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for name in there:
                if name.startswith(RUN_FILES) and name.endswith(".tmp"):  # of a run that was killed while it saved
                    (self.path / name).unlink()
            if file.exists() and overwrite:
                self._delete_run(read_flags(file))
            elif file.exists():
                self._compare(read_flags(file), mine)
            atomic_save(file, json.dumps(mine, indent=1).encode())
        except OSError as error:
            refuse(f"--run-dir {self.path} cannot be used: {error}")

    def _take_lock(self) -> None:
        """Keep other runs out until this process ends, however it does: the kernel lets go of the lock then.

        `lockf` and not `flock`: its locks are not inherited by loader workers, which outlive a killed run by seconds.
        """
        self.lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            refuse(f"{self.path} is in use by another run; wait for its end, or take another --run-dir")
        except OSError as error:  # some network file systems have no locks
            warn(f"{self.path} cannot be locked ({error}): see to it that no other run uses it")

    def _delete_run(self, old: dict[str, Any]) -> None:
        """What the run with the flags `old` wrote, and evaluate.py about it, and nothing else; the flags go last."""
        events, results = [], self.path / "results.jsonl"
        if old.get("tensorboard"):
            events = [file.name for file in self.path.glob("events.out.tfevents.*")]
        evaluations = []
        for line in results.read_bytes().splitlines() if results.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that is damaged names nothing
                evaluations += [Path(name).name for name in json.loads(line)["files"]]
        for name in (*evaluations, results.name, *events, *reversed(RUN_FILES)):
            (self.path / name).unlink(missing_ok=True)

    def _compare(self, old: dict[str, Any], mine: dict[str, Any]) -> None:
        """Refuse to go on with a run of another method, of other flags, or, where these come from the data, on it."""
        other = "take another --run-dir, or --overwrite it"
        if old.get("method") != self.method:
            refuse(f"{self.path} holds a run of {old.get('method', 'another version')}, not of {self.method}; {other}")
        changed = [name for name in mine if name not in FREE_FLAGS and old.get(name) != mine[name]]
        if {"batch_size", "image_size"} & set(changed):
            self._read_checkpoint()  # where the default followed the images, it is they that have changed
        if changed:
            was = ", ".join(f"{flag_of(n)} was {old.get(n)} and is now {mine[n]}" for n in changed)
            refuse(f"{self.path} holds another run: {was}; {other}")
        if mine["epochs"] < old["epochs"]:
            refuse(f"{self.path} was begun with --epochs {old['epochs']}; take as many or more to continue it")

    def restore(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Load the checkpoint, if there is one, into the objects of `state`; all that it holds, or None."""
        saved = on_rank_0(self._read_checkpoint)  # only rank 0's disk need hold the folder
        try:
            for name, thing in state.items() if saved else ():
                if saved[name]:  # a scaler that was not in use has no state
                    thing.load_state_dict(saved[name])
        except Exception as error:  # what is saved in another form can raise almost anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            refuse(f"the checkpoint in {self.path} does not fit this version of the code ({reason}); --overwrite it")
        self.saved_step = saved["step"] if saved else 0
        return saved

    def _read_checkpoint(self) -> dict[str, Any] | None:
        files = [self.path / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
        files = [file for file in files if file.exists()]
        for file in files:
            try:
                saved = torch.load(file, map_location="cpu", weights_only=True)
                was, _, _ = saved["dataset"], saved["step"], saved["log_bytes"]
            except Exception as error:  # a damaged or foreign file can raise almost anything
                warn(f"{file} cannot be read ({type(error).__name__})")
                continue
            if was != self.dataset:
                now = self.dataset
                names = ("images", "classes", "file names", "targets")
                changed = [name for name in names if was.get(name) != now.get(name)]
                kept = (
                    f"{was['images']} images" if "images" in changed else f"images with other {' and '.join(changed)}"
                )
                holds = f"--data-dir now holds {now['images']}"
                refuse(f"{self.path} is of {kept}, and {holds}; take another --run-dir, or --overwrite it")
            return saved
        if files:
            refuse(f"no checkpoint in {self.path} can be read; --overwrite starts the run anew")
        return None

    def signal_of_any_rank(self) -> int:
        """The number of the signal that asked this run to end, 0 if none did; the same on all ranks."""
        return int(all_gather(torch.tensor([self.signal])).max())  # so all ranks stop after the same step

    def save(self, step: int, encoder: nn.Module, state: dict[str, Any], log_bytes: int) -> None:
        """`encoder` to encoder.pt, the rest of `state["model"]` to heads.pt, all to checkpoint.pt. Rank 0 alone."""
        model = state["model"]
        inside = tuple(name + "." for name, module in model.named_modules() if module is encoder)
        heads = {name: w.cpu() for name, w in model.state_dict().items() if not name.startswith(inside)}
        checkpoint = {name: thing.state_dict() for name, thing in state.items()}
        checkpoint |= {"step": step, "dataset": self.dataset, "log_bytes": log_bytes}
        try:
            # The checkpoint comes last: a run killed in between takes these steps again and writes all three.
            atomic_save(self.path / "encoder.pt", {name: w.cpu() for name, w in encoder.state_dict().items()})
            atomic_save(self.path / "heads.pt", heads)
            atomic_save(self.path / "checkpoint.pt", checkpoint, keep_as=self.path / "checkpoint.previous.pt")
        except (OSError, RuntimeError) as error:
            kept = f"the one of step {self.saved_step} is intact" if self.saved_step else "there is none before it"
            abort(f"step {step}: cannot save a checkpoint in {self.path} ({error}); {kept}")
        self.saved_step = step

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock is not None:
            os.close(self.lock)


def read_flags(file: Path, required: bool = True) -> dict[str, Any]:
    """The flags of the run whose args.json `file` is. Another file, or a damaged one, is refused; if it is not
    `required`, it is ignored with a warning, and the result is empty.
    """
    try:
        flags = json.loads(file.read_bytes())
        size, epochs, mean, std = (flags[name] for name in ("image_size", "epochs", "mean", "std"))
        known = flags["dataset"] in typing.get_args(typing.get_type_hints(Flags)["dataset"])
        known = known and isinstance(flags["data_dir"], str) and type(size) is type(epochs) is int and size > 0
        if known and len(mean) == len(std) == 3 and min(std) > 0 and all(map(math.isfinite, [*mean, *std])):
            return flags
        fault = "values that no run has"
    except KeyError as error:
        fault = f"no {error}"
    except Exception as error:  # what is not ours can hold anything
        fault = str(error)
    if required:
        refuse(f"{file} does not hold the flags of a run ({fault}); restore it, or take another folder")
    warn(f"{file} does not hold the flags of a run and is ignored ({fault})")
    return {}


def read_records(file: Path, content: bytes) -> list[dict[str, Any]]:
    """The JSON objects in the `content` of a file, one per line; a line that is none is refused."""
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            refuse(f"{file}: line {number} is not of a run; restore the file, or --overwrite the run")
        records.append(record)
    return records


def atomic_save(file: Path, content: bytes | dict[str, Any], keep_as: Path | None = None) -> None:
    """Replace `file` in one step, by bytes or by a dict as `torch.save` writes it; the old may stay as `keep_as`.

    Two processes may write the same file: each has a temporary one of its own. An OSError says why it failed.
    """
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as handle:
            if isinstance(content, bytes):
                handle.write(content)
            else:
                torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
        if keep_as and file.exists():
            os.replace(file, keep_as)
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides a full disk behind an error of its own
            raise error.__context__ from None
        raise


class Log:
    """What a run tells: metrics.jsonl, console, TensorBoard. It ends a run that diverges, and warns of collapse."""

    def __init__(self, args: Flags, steps_per_epoch: int, last_step: int):
        self.args, self.file = args, Path(args.run_dir, "metrics.jsonl")
        self.steps_per_epoch, self.last_step, self.board = steps_per_epoch, last_step, None
        self.latest: dict[str, float] = {}  # value of each metric
        self.unchecked: list[tuple[int, float, list[str], Tensor]] = []  # (step, lr, names, values) since the last line
        self.collapsed: set[str] = set()  # signs seen at the last line
        self.clock = (time.perf_counter(), 0)  # (time, step) of the last line
        self.columns, self.lines = [], 0  # (name, width) of each column on the console, and lines so far

    def open(self, step: int, size: int) -> None:
        """Keep the first `size` bytes of metrics.jsonl: the steps that were logged beyond `step` are taken again."""
        on_rank_0(lambda: self._cut(step, size))
        self.clock = (time.perf_counter(), step)

    def _cut(self, step: int, size: int) -> None:
        content = self.file.read_bytes()[:size] if self.file.exists() else b""
        content = content[: content.rfind(b"\n") + 1]  # whole lines, even if the disk lost some
        atomic_save(self.file, content)
        for record in read_records(self.file, content):
            self.latest |= record
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                refuse("--tensorboard needs the tensorboard package: pip install tensorboard")
            self.board = SummaryWriter(str(self.file.parent), purge_step=step + 1)

    def bytes(self) -> int:
        return self.file.stat().st_size

    def step(self, step: int, loss: Tensor, terms: dict[str, Tensor], lr: float, z: Tensor) -> None:
        """Every --log-every steps a line on the console and in metrics.jsonl. z (n, d) is watched for collapse."""
        if self.unchecked and self.unchecked[-1][2] != ["loss", *terms]:
            self.check_finite()  # a stage of training begins that has other terms
        self.unchecked.append((step, lr, ["loss", *terms], torch.stack([loss, *terms.values()]).detach()))
        if step % self.args.log_every and step != self.last_step:
            return
        values, z = self.check_finite(), all_gather(z.detach())
        (then, then_step), self.clock = self.clock, (time.perf_counter(), step)
        rate = (step - then_step) / (self.clock[0] - then)  # steps per second
        epoch, images_per_s, health = step / self.steps_per_epoch, rate * self.args.batch_size, embedding_health(z)
        self.write({"step": step, "epoch": epoch, **values, "lr": lr, "images_per_s": images_per_s, **health})
        row = {"epoch": f"{epoch:5.1f}", "step": f"{step:6d}"}
        for name, value in values.items():  # four decimals, fewer where they make more than seven characters
            row[name] = min((f"{value:7.{decimals}f}" for decimals in (4, 1, 0)), key=len)
        row |= {"lr": f"{lr:8.5f}", "spread": f"{health['embedding_std'] * z.shape[1] ** 0.5:6.3f}"}
        row |= {"effective_rank": f"{health['effective_rank']:7.1f}", "images/s": f"{images_per_s:8.0f}"}
        self._tell({**row, "time_left": f"{clock((self.last_step - step) / rate):>9}"})
        signs = signs_of_collapse(z, **health)
        for sign in signs.keys() - self.collapsed if rank_and_world()[0] == 0 else ():
            warn(f"collapse at step {step}: {signs[sign]}")
        self.collapsed = set(signs)

    def _tell(self, row: dict[str, str]) -> None:
        """A line on the console; every 30 lines, and where the columns change, their names above it in two lines."""
        names = [name.rpartition("_")[::2] for name in row]  # time_left: time over left
        widths = [max(len(text) for text in (cell, *name)) for cell, name in zip(row.values(), names, strict=True)]
        header = list(zip(*names, strict=True)) if self.lines % 30 == 0 or self.columns != [names, widths] else []
        for line in (*header, row.values()):
            say(" ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
        self.columns, self.lines = [names, widths], self.lines + 1

    def check_finite(self) -> dict[str, float]:
        """Loss and terms of the last step, mean over ranks, once those of every step since the last look are finite."""
        if not self.unchecked:
            return {}
        steps, rates, names, values = zip(*self.unchecked, strict=True)
        self.unchecked.clear()
        table = all_gather(torch.stack(values).double()[None]).mean(0)  # steps×terms
        for step, lr, row in zip(steps, rates, table.tolist(), strict=True):
            row = dict(zip(names[0], row, strict=True))
            broken = ", ".join(f"{name} is {value}" for name, value in row.items() if not math.isfinite(value))
            if broken:
                fix = "lower --base-lr" if step > 1 else "no step was taken before: look at the flags and the images"
                abort(f"step {step}: {broken} at learning rate {lr:.4g}; nothing was saved since; {fix}")
        return row

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep the time of what is done within out of images per second."""
        began = time.perf_counter()
        yield
        self.clock = (self.clock[0] + time.perf_counter() - began, self.clock[1])

    def write(self, record: dict[str, float]) -> None:
        """A line of metrics.jsonl."""
        self.latest |= record
        on_rank_0(lambda: self._append(record))

    def _append(self, record: dict[str, float]) -> None:
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            abort(f"step {record['step']}: cannot write to {self.file.parent} ({error})")
        if self.board:
            for name in record.keys() - {"step", "epoch"}:
                self.board.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        if self.board:
            self.board.close()


@dataclass
class Judge:
    """What a network's features are worth on images without augmentation. All ranks call; each computes its share."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    compute: "Compute"
    workers: int

    @torch.no_grad()
    def features(self, net: nn.Module, data: "Data") -> Tensor:
        """(N, d) float32 features of every image, in eval mode, on all ranks."""
        (rank, world), was_training, pieces = rank_and_world(), net.training, []
        share = math.ceil(len(data) / world)
        rows = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(data) - 1)  # repeats are cut off below
        net.eval()
        for x in centred_views(data, rows, self.image_size, self.compute, self.workers):
            with self.compute.autocast:
                pieces.append(net(normalize(x, self.mean, self.std)).float())  # n×d
        net.train(was_training)
        if data.pixels is None:  # decoding may have changed some
            data.labels, data.targets = (all_gather(y[rows])[: len(data)] for y in (data.labels, data.targets))
        return all_gather(torch.cat(pieces))[: len(data)]

    def knn_top1(self, net: nn.Module, train: "Data", test: "Data") -> float:
        """Accuracy, a fraction, of the 20 nearest neighbours in `train`; labels from 0."""
        train_x, test_x = self.features(net, train), self.features(net, test)
        train_y, test_y = train.labels.to(train_x.device), test.labels.to(test_x.device)
        return knn_accuracy(train_x, train_y, test_x, test_y, k=20)


# -------------------------------------------------------------------------------------------------- processes
#
# Why any number of processes has the same loss and gradient as one:
#   1. Losses gather the embeddings of all ranks, with gradient (`all_gather`), or are means over this rank's images;
#      either way the mean of the ranks' gradients, which DistributedDataParallel takes, is that of one process.
#   2. BatchNorm takes its statistics from the images of all ranks (`sync_batchnorm`).
#   3. Random numbers belong to images, not to processes (`Draws`): each rank takes its slice of the same ones.


def start_processes() -> torch.device:
    """Join torchrun's process group, if there is more than one process; return this process's device."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            refuse(f"WORLD_SIZE is set but {missing[0]} is not: start with torchrun, or unset WORLD_SIZE")
        first, own_store = os.environ["RANK"] == "0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        if first and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get(own_store) != "1":
            warn(f"--max-restarts: set {own_store}=1, or restarted processes may call at dead ones' addresses and hang")
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if first and cuda and processes > gpus:  # NCCL refuses that
            warn(f"{processes} processes share {gpus} GPU and so use gloo, which is slow; let each see all GPUs")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda and processes <= gpus else "gloo")
    return device


class Compute(NamedTuple):
    """Where, and how exactly, a network computes."""

    device: torch.device
    dtype: torch.dtype  # of weights and images
    autocast: contextlib.AbstractContextManager  # around the network's forward pass


def compute_in(precision: str, device: torch.device) -> tuple[Compute, torch.amp.GradScaler]:
    """What `--precision` says, and a gradient scaler for fp16."""
    precision = usual_precision(device) if precision == "auto" else precision
    dtype = torch.float64 if precision == "fp64" else torch.float32
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    autocast = torch.autocast(device.type, half) if half else contextlib.nullcontext()
    return Compute(device, dtype, autocast), torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def usual_precision(device: torch.device) -> str:
    """bf16 where the device has instructions for it; else fp16 on a GPU, and fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if any(torch.cpu.get_capabilities().get(kind) for kind in ("avx512_bf16", "amx_bf16")) else "fp32"


def rank_and_world() -> tuple[int, int]:
    """(0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_rows(total: int) -> slice:
    """This rank's contiguous slice of `total` rows (a multiple of the number of processes)."""
    rank, world = rank_and_world()
    return slice(rank * total // world, (rank + 1) * total // world)


def on_rank_0(action: Callable[[], Any]) -> Any:
    """The result of `action`, run on rank 0 only; where it ends the program there, it ends on every rank."""
    rank, world = rank_and_world()
    shared = [None, None]  # the result, an exit code
    if rank == 0:
        try:
            shared[0] = action()
        except SystemExit as end:
            shared[1] = end.code
    if world > 1:
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
    if shared[1] is not None:
        raise SystemExit(shared[1])
    return shared[0]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(rows.chunk(dist.get_world_size())), x.contiguous())
        return rows

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # A row's gradient is the sum over the losses of all ranks: each of them used that row.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[my_rows(len(grad))]


def all_gather(x: Tensor) -> Tensor:
    """Rows of every rank in rank order, as many from each: (n, ...) -> (world·n, ...); x itself without a group.

    Backward gives each row the gradient of the sum of all ranks' losses, and DistributedDataParallel then averages over
    ranks. So the result is the gradient of the mean loss, be it the same on all (VICReg) or each rank's own (SimCLR).
    """
    return _AllGather.apply(x) if dist.is_initialized() else x


def full_precision(z: Tensor) -> Tensor:
    """float32 in place of a half type, for losses: their sums would be rounded or overflow. float64 stays."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes, as many on each, for CPU tensors (`nn.SyncBatchNorm` is CUDA only)."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        given, x = x.dtype, full_precision(x)  # also under autocast
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        var, mean = torch.var_mean(x, dims, correction=0)  # C
        stats = all_gather(torch.stack([mean, var])[None])  # W×2×C
        mean = stats[:, 0].mean(0)  # C
        # The spread around the global mean is the spread inside each rank plus that of the ranks' means.
        var = (stats[:, 1] + (stats[:, 0] - mean) ** 2).mean(0)  # C
        if self.track_running_stats:
            n = x.numel() // x.shape[1] * len(stats)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var.dtype), self.momentum)
        x = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x).to(given)


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of `model` use the statistics of the global batch; nothing to do for one process."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):  # a method's own kinds stay as they are
            module.__class__ = SyncBatchNorm  # same parameters, buffers and state-dict keys
    return model


def distribute(model: nn.Module) -> nn.Module:
    """Average gradients over processes (DDP); the model itself for one process."""
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    network = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    # Its last attribute, so that it outlives the reducer: one that ends its own group may hang (torch 2.11).
    network.process_group = network.__dict__.pop("process_group")
    return network


# ----------------------------------------------------------------------------------------------------- images

# What Pillow opens, but for films, scientific data and vector graphics.
NO_PICTURES = {".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits", ".wmf", ".emf", ".eps", ".ps"}
IMAGE_SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN} - NO_PICTURES
RESIDENT_SIDE = 256  # larger images are cropped by the loader's workers before they become a batch
RESIDENT_BYTES = 2**31  # a folder of equally sized images is kept in memory up to this many bytes


@dataclasses.dataclass
class Data:
    """One split: every image in `pixels` where they fit in memory, else decoded from `files` as they are needed."""

    pixels: Tensor | None  # (N, 3, H, W) uint8
    files: np.ndarray | None  # (N,) paths as bytes: an array, so that workers share it without copying
    labels: Tensor  # (N,) int64, -1 where unknown
    classes: list[str]
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `load_data` says of all images there are
    bad: dict[str, str] = dataclasses.field(default_factory=dict)  # files that could not be decoded, and why
    targets: Tensor = None  # (N,) float64, a number to predict, NaN where unknown; all are, if it is left out
    full_decode: bool = False  # JPEGs are not decoded at reduced scale

    def __post_init__(self) -> None:
        if self.targets is None:
            self.targets = torch.full((len(self.labels),), math.nan, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "Data":
        pixels = None if self.pixels is None else self.pixels[index.to(self.pixels.device)]
        files = None if self.files is None else self.files[index.numpy()]
        return dataclasses.replace(
            self, pixels=pixels, files=files, labels=self.labels[index], targets=self.targets[index], bad={}
        )

    def rows_with(self, known: Literal["labels", "targets"]) -> Tensor:
        """Which of the images have a label, or a target."""
        return (self.labels >= 0 if known == "labels" else self.targets.isfinite()).nonzero()[:, 0]

    def replace(self, rows: Any, used: Any) -> None:
        """The images of `rows` are bad, and those of `used` stand for them: with their labels and targets."""
        self.labels[rows], self.targets[rows] = self.labels[used], self.targets[used]

    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of about a hundred images."""
        if self.pixels is not None:
            return [(self.pixels.shape[3], self.pixels.shape[2])]
        found = [read_or_next(self.files, i, upright_size) for i in range(0, len(self), max(1, len(self) // 100))]
        count_bad(self, [error for _, _, errors in found for error in errors], every_rank=False)
        return [size for size, _, _ in found]


class Crop(NamedTuple):
    """A random resized crop with flip, made where the image is decoded; `scale` bounds its share of the area."""

    size: int
    scale: tuple[float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: float = 0.5


def load_data(
    dataset: str, data_dir: str, train_limit: int, device: torch.device, known: Literal["labels", "targets"] = "labels"
) -> tuple[Data, Data | None]:
    """(training split, test split or None); pixels, if they fit in memory, are on `device`. Of the test images those
    whose label, or whose target, is `known`: none if it is known of no training image.
    """
    root = Path(data_dir or "data")
    if dataset == "folder":
        train, test = load_folder(root)
    elif dataset == "patterns":
        train, test = patterns("train", 5000), patterns("test", 1000)
    else:
        train, test = load_torchvision(dataset, root)
    for data in (train, test):
        if data:
            data.whole |= {"images": len(data), "classes": list(data.classes)}
    marks = all_gather(torch.tensor([zlib.crc32(repr((train.whole, test and test.whole)).encode())]))
    if (other := marks != marks[0]).any():
        refuse(f"--data-dir {root} is not the same on rank {int(other.int().argmax())} as on rank 0: copy it anew")
    if train_limit and train_limit < len(train):
        chosen = np.random.default_rng(0).permutation(len(train))[:train_limit]  # the same for every --seed
        train = train.subset(torch.from_numpy(np.sort(chosen)))
    to_learn, to_test = (data.rows_with(known) if data else [] for data in (train, test))
    if not (len(to_learn) and len(to_test)):
        test = None  # nothing to compare with, or nothing to compare
    elif len(to_test) < len(test):
        test = test.subset(to_test)
    for data in (train, test):
        if data and data.pixels is not None:
            data.pixels = data.pixels.to(device)
    return train, test


def load_torchvision(name: str, root: Path) -> tuple[Data, Data]:
    """CIFAR-10, CIFAR-100 or STL-10 (with its unlabelled images), downloaded to `root` where missing."""
    kind = getattr(torchvision.datasets, name.upper())  # CIFAR10, CIFAR100 or STL10
    splits = ("train+unlabeled", "test") if name == "stl10" else (True, False)

    def download() -> None:
        try:
            for split in splits:
                kind(root, split, download=True)
        except (OSError, RuntimeError) as error:
            refuse(f"--dataset {name} is not in --data-dir {root} and cannot be downloaded: {error}")

    on_rank_0(download)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 < rank_and_world()[0]:
        download()  # on a machine with a disk of its own
    all_gather(torch.zeros(1))  # wait for all
    found = []
    for source in (kind(root, split) for split in splits):
        pixels = torch.from_numpy(source.data)  # N×32×32×3 for CIFAR, N×3×96×96 for STL-10
        pixels = pixels if name == "stl10" else pixels.permute(0, 3, 1, 2).contiguous()
        labels = source.labels if name == "stl10" else source.targets
        found.append(Data(pixels, None, torch.as_tensor(labels).long(), source.classes))
    return found[0], found[1]


SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # names of folders


def load_folder(root: Path) -> tuple[Data, Data | None]:
    """The training images below `root` and a labelled test split, or None. It says how it read the folder:

    `train`, `val` (`valid`, `validation`) and `test`, in any case, directly below `root`, are splits. But `train` is a
    class if it holds no folders and other folders of images lie beside it: CIFAR-100 has such a class. What lies beside
    the split `train` is left out; without one, all that is not in `val` or `test` is for training. The folders on the
    next level are the classes, if they are two or more; images beside them have no label. The test split is the first
    of `val` and `test` that has class folders, all of them known, or targets. Equally sized images that fit into
    `RESIDENT_BYTES` are decoded once and kept. Targets come from `root/targets.csv`.
    """
    if not root.is_dir():
        refuse(f"--data-dir {root} is not a folder")
    files, places, left_out = list_images(root)
    table = root / "targets.csv"
    targets = read_targets(table, files)
    of_split: dict[str, list[int]] = {"": [], "train": [], "val": [], "test": []}
    for i, place in enumerate(places):
        of_split[SPLITS.get(place[0].lower(), "") if place else ""].append(i)
    rows, beside = of_split["train"], of_split[""]
    depth = 1 if rows and not (all(len(places[i]) == 1 for i in rows) and any(places[i] for i in beside)) else 0
    if depth == 0:
        rows = sorted(rows + beside)
    elif beside:
        left_out.append(f"{len(beside)} images beside the folder train, one is {os.fsdecode(files[beside[0]])}")
    if not rows:
        refuse(f"--data-dir {root} holds no training images" + f" ({'; '.join(left_out)})" * bool(left_out))

    def load(rows: list[int], depth: int, classes: list[str]) -> Data:
        number = {name: label for label, name in enumerate(classes)}
        labels = [number.get(places[i][depth], -1) if len(places[i]) > depth else -1 for i in rows]
        whole = {"file names": zlib.crc32(b"\0".join(file[len(os.fsencode(root)) :] for file in files[rows]))}
        if table.exists():
            whole["targets"] = zlib.crc32(targets[rows].numpy().tobytes())
        return decode_if_small(Data(None, files[rows], torch.tensor(labels), classes, whole, targets=targets[rows]))

    classes = sorted({places[i][depth] for i in rows if len(places[i]) > depth})
    classes = classes if len(classes) > 1 else []  # one folder around all of them says nothing
    if classes and (stray := [i for i in rows if len(places[i]) == depth]):
        warn(f"{len(stray)} training images have no label, for they lie in no class folder")
    test, tested = [], "nothing"
    for split in ("val", "test"):
        found = of_split[split]
        inside = [i for i in found if len(places[i]) > 1 or targets[i].isfinite()]
        unknown = {places[i][1] for i in inside if len(places[i]) > 1} - set(classes)
        if unknown and (classes or not table.exists()):
            left_out.append(f"{split}, where {min(unknown)!r} is no class of the training images")
        elif test and found:
            left_out.append(f"{split}, as {tested} is there")
        elif found:
            test, tested = inside, split if inside else tested
            if without := len(found) - len(inside):
                left_out.append(f"{without} images in {split} that lie in no class folder")
    if left_out:
        warn(f"--data-dir {root}: left out {'; '.join(left_out)}")
    if table.exists() and (without := int(targets[rows + test].isnan().sum())):
        warn(f"{without} of {len(rows + test)} images have no target, for {table} has no line for them")
    say(f"{root} read as {'train/' * depth}{'<class>/' * bool(classes)}*, tested on {tested}")
    return load(rows, depth, classes), load(test, 1, classes) if test else None


def read_targets(table: Path, files: np.ndarray) -> Tensor:
    """(N,) float64: the target of each of `files` by a CSV file, NaN where it has no line, or does not exist.

    A line is the name of an image, relative to the folder of the table, and a number; the first may be a heading.
    """
    targets, names, strange = torch.full((len(files),), math.nan, dtype=torch.float64), {}, []
    if not table.exists():
        return targets
    index = {file: i for i, file in enumerate(files.tolist())}
    try:
        with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.reader(file)
            for cells in filter(None, lines):
                try:
                    name, value = cells[0], float(*cells[1:] or [""])
                except (TypeError, ValueError):  # more cells than two, or no number
                    name, value = cells[0], math.nan
                row = index.get(os.fsencode(os.path.join(table.parent, os.path.normpath(name))))
                if lines.line_num == 1 and row is None and math.isnan(value):
                    continue  # the heading
                if not abs(value) <= 1e18:
                    refuse(f"{table}: line {lines.line_num} is not the name of an image, a comma and a number")
                if name in names:
                    refuse(f"{table}: line {lines.line_num} names {name} again, after line {names[name]}")
                names[name] = lines.line_num
                if row is None:
                    strange.append(name)
                else:
                    targets[row] = value
    except (OSError, csv.Error) as error:
        refuse(f"{table} cannot be read: {error}")
    if strange:
        warn(f"{table}: {len(strange)} lines name no image, the first is line {names[strange[0]]}, {strange[0]}")
    return targets


def list_images(root: Path) -> tuple[np.ndarray, list[tuple[str, ...]], list[str]]:
    """All images below `root`, sorted; for each the folders between them; and what was left out, but for hidden files.

    Links are followed, but no folder is entered twice. A run's own folder is left out.
    """
    files, places, left_out, seen, others, runs = [], [], [], set(), Counter(), 0

    def unreadable(error: OSError) -> None:
        left_out.append(f"{error.filename} ({error.strerror})")

    for parent, below, names in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(parent)
        if again := (status.st_dev, status.st_ino) in seen:
            left_out.append(f"{parent}, a link to a folder that was read already")
        seen.add((status.st_dev, status.st_ino))
        is_run = {"args.json", "metrics.jsonl"} <= set(names)
        runs += is_run
        below[:] = sorted(name for name in below if not (name.startswith(".") or again or is_run))
        names = sorted(name for name in names if not (name.startswith(".") or again or is_run))
        images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        known = {"targets.csv"} if Path(parent) == root else set()
        others.update(Path(name).suffix.lower() or "other" for name in set(names) - set(images) - known)
        files += [os.fsencode(os.path.join(parent, name)) for name in images]
        places += [Path(parent).relative_to(root).parts] * len(images)
    left_out += [f"{count} {suffix} files" for suffix, count in others.most_common(5)]
    left_out += [f"{runs} folders of runs"] * bool(runs)
    return np.array(files, dtype=bytes), places, left_out


def decode_if_small(data: Data) -> Data:
    """Decode the whole split into `pixels` if all images have one small size and fit into `RESIDENT_BYTES`."""
    sizes = set(data.sizes())
    if len(sizes) != 1 or max(size := sizes.pop()) > RESIDENT_SIDE or 3 * math.prod(size) * len(data) > RESIDENT_BYTES:
        return data
    pixels = np.empty((len(data), 3, size[1], size[0]), dtype=np.uint8)  # filled faster than a tensor
    for index in range(len(data)):  # threads would wait for one another: at this size most of the work is Python's
        image, used, errors = read_or_next(data.files, index, to_rgb)
        if errors:
            count_bad(data, errors, every_rank=False)
            data.replace(index, used)
        if image is None or image.size != size:
            return data
        pixels[index] = np.asarray(image).transpose(2, 0, 1)  # 3×H×W
    return dataclasses.replace(data, pixels=torch.from_numpy(pixels), files=None)


def read_or_next(files: np.ndarray, index: int, read: Callable) -> tuple[Any, int, list[tuple[str, str]]]:
    """`read` of the opened image at `index`, or, where that fails, of the next one; which one it was; the failures.

    It gives up, and the result is None, where so many fail that `count_bad` stops the run.
    """
    errors = []
    for i in range(min(len(files), max(10, len(files) // 100) + 1)):
        used = (index + i) % len(files)
        file = os.fsdecode(files[used])
        try:
            with Image.open(file) as image:
                return read(image), used, errors
        except Exception as error:  # a damaged file can raise almost anything
            errors.append((file, f"{type(error).__name__}: {error}".replace(f" {file!r}", "")))
    return None, index, errors


def count_bad(data: Data, errors: list[tuple[str, str]], every_rank: bool = True) -> None:
    """Warn of the first ten files that cannot be decoded. More than ten that are also more than 1 % stop the run, and
    so does it if there is no other file. `every_rank`: each rank decodes images of its own.
    """
    new = {file: error for file, error in errors if file not in data.bad}
    data.bad |= new
    if data.bad and (len(data.bad) > max(10, len(data) / 100) or len(data.bad) == len(data)):
        file, error = next(iter(data.bad.items()))
        example = f"{len(data.bad)} of {len(data)} files cannot be decoded, one is {file} ({error})"
        refuse(f"--data-dir: {example}; mend or remove them", every_rank)
    for file in list(data.bad)[len(data.bad) - len(new) : 10]:
        warn(f"{file} cannot be decoded and is replaced by another image ({data.bad[file]})", every_rank)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image once it is turned as EXIF says."""
    if image.format == "TIFF":
        image.load()  # Pillow turns a TIFF itself, and then takes the tag away
    with contextlib.suppress(Exception):  # damaged EXIF can raise almost anything, and the image may be good
        if image.getexif().get(0x0112) in (5, 6, 7, 8):  # on its side
            return image.size[::-1]
    return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Any opened image as upright RGB.

    Grey is repeated three times, palettes are looked up, CMYK is converted, transparent pixels are laid on white, an
    animation gives its first frame. 16-bit and integer images are divided by 257, float images are taken as 0 to 1.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF can raise almost anything, and the image may be good
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64) * (255 if image.mode == "F" else 1 / 257)
        image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def decode_crops(
    image: Image.Image, boxes: list[list[int]], crops: list[Crop], full_decode: bool = False
) -> list[Tensor]:
    """Each box (top, left, height, width) of an opened image, resized to its crop's size: (3, size, size) uint8. Unless
    `full_decode`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where every box still covers the pixels it is
    resized to: that is faster, and costs a few per cent of its contrast between neighbouring pixels.
    """
    width, _ = upright_size(image)
    if not full_decode:
        reduction = max(1, min(min(box[2:]) // crop.size for box, crop in zip(boxes, crops, strict=True)))
        image.draft(None, (image.width // reduction, image.height // reduction))
    rgb = to_rgb(image)
    scale = rgb.width / width
    views = []
    for (top, left, h, w), crop in zip(boxes, crops, strict=True):
        x0, x1 = left * scale, min((left + w) * scale, rgb.width)
        y0, y1 = top * scale, min((top + h) * scale, rgb.height)
        # Cropping first keeps pixels outside the box out of the resampling, as torchvision's resized_crop does.
        part = rgb.crop((int(x0), int(y0), math.ceil(x1), math.ceil(y1)))
        box, kernel = (x0 - int(x0), y0 - int(y0), x1 - int(x0), y1 - int(y0)), crop.interpolation.upper()
        views.append(pil_to_tensor(part.resize((crop.size, crop.size), Image.Resampling[kernel], box)))
    return views


class ImageFiles(torch.utils.data.Dataset):
    """For loader workers: (epoch, index) -> what `read_or_next` says, with views, (3, size, size) uint8 each.

    With a seed, a view is a random crop that belongs to (seed, epoch, image, view), where views are numbered from
    `first`; without one, that of `centre_box`.
    """

    def __init__(self, data: Data, crops: list[Crop], seed: int | None = None, first: int = 0):
        self.files, self.full_decode, self.crops = data.files, data.full_decode, crops
        self.seed, self.first = seed, first

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor] | None, int, list[tuple[str, str]]]:
        def read(image: Image.Image) -> list[Tensor]:
            width, height = upright_size(image)
            if self.seed is None:
                boxes = [centre_box(height, width, crop.size) for crop in self.crops]
                return decode_crops(image, boxes, self.crops, self.full_decode)
            views = enumerate(self.crops, self.first)
            drawn = [(Draws((CROPS, self.seed, *key, view), 1), crop) for view, crop in views]
            boxes = [random_boxes(d, height, width, crop.scale)[0].tolist() for d, crop in drawn]
            views = decode_crops(image, boxes, self.crops, self.full_decode)
            return [v.flip(-1) if d.chance(crop.flip) else v for v, (d, crop) in zip(views, drawn, strict=True)]

        return read_or_next(self.files, key[1], read)

    def load(self, keys: Iterable[list[tuple[int, int]]], workers: int) -> Iterator[tuple[list[Tensor], Tensor, list]]:
        """For each list of keys: its views, (n, 3, size, size) uint8 each, none if that failed; which images they
        are, (n,) int64; and the files that cannot be decoded.
        """
        if workers:
            atexit.register(end_workers)
        pin, quiet = torch.cuda.is_available(), keep_signals_to_the_main_process
        options = {"num_workers": workers, "collate_fn": collate, "pin_memory": pin, "worker_init_fn": quiet}
        return iter(torch.utils.data.DataLoader(self, batch_sampler=keys, **options))


def collate(items: list[tuple[list[Tensor] | None, int, list]]) -> tuple[list[Tensor], Tensor, list]:
    views, used, errors = zip(*items, strict=True)
    stacked = [] if None in views else [torch.stack(view) for view in zip(*views, strict=True)]
    return stacked, torch.tensor(used), [error for some in errors for error in some]


def keep_signals_to_the_main_process(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):  # torchrun and `timeout` send it to all of them
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:  # at exit, for multiprocessing would send them SIGTERM, and wait
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def centre_box(height: int, width: int, size: int) -> list[int]:
    """The test view, (top, left, height, width): all of an image of that size, else the central 224/256 of it."""
    if height == width == size:
        return [0, 0, height, width]
    side = round(min(height, width) * 224 / 256)
    return [(height - side) // 2, (width - side) // 2, side, side]


def centred_views(data: Data, rows: Iterable[int], size: int, compute: Compute, workers: int) -> Iterator[Tensor]:
    """The images of `rows` without augmentation, in batches of (<=256, 3, size, size) in [0, 1]: see `centre_box`."""
    chunks, (device, dtype, _) = torch.as_tensor(rows).split(256), compute
    if data.pixels is None:
        keys = [[(0, index) for index in chunk.tolist()] for chunk in chunks]
        loaded = ImageFiles(data, [Crop(size, (1, 1), "bilinear")]).load(keys, workers)
        for chunk, (views, used, errors) in zip(chunks, loaded, strict=True):
            count_bad(data, errors)
            data.replace(chunk, used)
            yield views[0].to(device, non_blocking=True).to(dtype) / 255
    for chunk in chunks if data.pixels is not None else ():
        images = data.pixels[chunk.to(device)].to(dtype) / 255
        if images.shape[2:] != (size, size):
            box = torch.tensor([centre_box(*images.shape[2:], size)])
            images = resized_crop(images, box.expand(len(images), 4), size, "bilinear")
        yield images


def _wrap(t: np.ndarray) -> np.ndarray:
    return t - np.round(t)  # signed distance to the nearest integer


def _texture(family: str, s: np.ndarray, t: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(n, 32, 32) coordinates s, t in periods and (n, 16, 1, 1) uniform numbers u -> ink where positive."""
    near_s, near_t = s + 2.4 * (u[:, 0] - 0.5), t + 2.4 * (u[:, 1] - 0.5)  # about a centre in the image
    match family:
        case "stripes":
            return 0.25 - abs(_wrap(s + u[:, 0]))
        case "zigzag":
            return 0.12 - abs(_wrap(0.75 * s + u[:, 0] + 1.8 * abs(_wrap(0.4 * t + u[:, 1]))))
        case "bricks":
            s, t = 0.45 * s + u[:, 0], 0.9 * t + u[:, 1]
            return np.minimum(1.8 * abs(_wrap(s + 0.5 * (np.floor(t) % 2))), abs(_wrap(t))) - 0.13
        case "checks":
            return 0.25 * np.sin(np.pi * (s + 2 * u[:, 0])) * np.sin(np.pi * (t + 2 * u[:, 1]))
        case "dots":
            s, t = 0.75 * s + u[:, 0], 0.75 * t + u[:, 1]
            return 0.25 - np.hypot(_wrap(s + 0.5 * (np.round(t) % 2)), 0.87 * _wrap(t))
        case "triangles":
            s, t = 0.6 * np.pi * (s + 3 * u[:, 0]), 0.6 * np.pi * (t + 3 * u[:, 1])
            return 0.15 + 1.2 * np.sin(t) * np.sin(0.5 * t + 0.866 * s) * np.sin(0.5 * t - 0.866 * s)
        case "rays":
            return 0.4 * np.sin(np.floor(6 + 6 * u[:, 2]) * np.arctan2(near_t, near_s))
        case "rings":
            return 0.25 - abs(_wrap(np.hypot(near_s, near_t) + u[:, 2]))
        case "spiral":
            turns = 4 * np.sign(u[:, 2] - 0.5) * np.arctan2(near_t, near_s)
            return 0.25 * np.sin(np.pi * np.hypot(near_s, near_t) + turns)
        case "clouds":
            angle = np.pi / 8 * (np.arange(8, dtype=np.float32)[:, None, None] + u[:, :8])
            waves = 3 * (np.cos(angle) * s[:, None] + np.sin(angle) * t[:, None])
            return 0.04 * np.sin(waves + 2 * np.pi * u[:, 8:]).sum(1)


PATTERN_CLASSES = ("stripes", "zigzag", "bricks", "checks", "dots", "triangles", "rays", "rings", "spiral", "clouds")


def patterns(split: str, count: int, seed: int = 0) -> Data:
    """Ten procedural texture families, the same images for the same `split` ("train" or "test") and `seed`.

    The pixels are (count, 3, 32, 32), label i is i % 10, and the target is the period in pixels, 4.5 to 11.1. The class
    is the family and nothing else: angle, phase, period, shear, a faint wash of colour and pixel noise are drawn anew
    for every image. Contrast and brightness are the same for all and the colours muted: these survive a crop so easily
    that methods which only predict one view from another (BYOL, SimSiam) would learn them instead. Shading, by which
    raw pixels are told apart, is taken out.
    """
    draws, grains = np.random.default_rng((seed, ("train", "test").index(split))).spawn(2)
    u = draws.random((count, 27, 1, 1), dtype=np.float32)  # a row per image, whatever `count` is
    labels = np.arange(count) % len(PATTERN_CLASSES)
    pixels = np.empty((count, 3, 32, 32), dtype=np.uint8)
    for start in range(0, count, 500):  # pieces that fit into the processor's cache take a third of the time
        rows = slice(start, start + 500)
        pixels[rows] = _paint(u[rows], labels[rows], grains)
    periods = torch.from_numpy(_period(u).ravel()).double()
    return Data(torch.from_numpy(pixels), None, torch.from_numpy(labels), list(PATTERN_CLASSES), targets=periods)


def _period(u: np.ndarray) -> np.ndarray:
    """(n, 1, 1) pixels."""
    return 4.5 * 2 ** (1.3 * u[:, 1])


def _paint(u: np.ndarray, labels: np.ndarray, grains: np.random.Generator) -> np.ndarray:
    """(n, 3, 32, 32) uint8 images of the families `labels` from numbers u (n, 27, 1, 1) in [0, 1)."""
    y, x = np.mgrid[-15.5:16, -15.5:16].astype(np.float32)
    turn, period = 2 * np.pi * u[:, 0], _period(u)
    sheared = x + 2 * (u[:, 2] - 0.5) * y
    s = (np.cos(turn) * sheared + np.sin(turn) * y) / period
    t = (np.cos(turn) * y - np.sin(turn) * sheared) / period
    ink = np.empty_like(s)
    for label, family in enumerate(PATTERN_CLASSES):
        own = labels == label
        ink[own] = _texture(family, s[own], t[own], u[own, 11:])
    ink = np.tanh(1.5 * period * ink)  # soft edges
    blur = blur_matrix(torch.tensor([1.2]), 9, 32)[0].numpy()
    ink -= blur @ ink @ blur.T  # no shading
    ink -= ink.mean((1, 2), keepdims=True)
    ink *= 0.2 / (ink.std((1, 2), keepdims=True) + 1e-6)
    turn, phase = 2 * np.pi * u[:, 3], 2 * np.pi * u[:, 4:5] + 0.6 * u[:, 5:8]  # the channels a little out of step
    wash = np.sin(2 * np.pi / 25 * (np.cos(turn) * x + np.sin(turn) * y)[:, None] + phase)
    images = 0.02 * grains.standard_normal(wash.shape, dtype=np.float32)
    images += 0.5 + 0.04 * wash + ink[:, None] * (0.9 + 0.2 * u[:, 8:11])
    return (255 * images.clip(0, 1)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ networks, optimizer

ARCHITECTURES = ["resnet10", *torchvision.models.list_models(torchvision.models, include=["resn*", "wide_resnet*"])]


def backbone(arch: str, stem: str, zero_init: bool, norm: str = "batch") -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier, and the width d of its pooled features: (n, 3, H, W) -> (n, d).
    `arch` is resnet10 (one BasicBlock per stage) or any ResNet of torchvision. Stem `small`, for about 32 pixels, is a
    3x3 convolution of stride 1 without max-pooling. `zero_init` starts the last BatchNorm weight of every branch at 0.
    `norm` is "batch" or "group": GroupNorm, 16 channels a group, without statistics of the batch.
    """
    if arch not in ARCHITECTURES:
        refuse(f"--arch {arch} is unknown; take one of {', '.join(ARCHITECTURES)}")
    layer = {"batch": nn.BatchNorm2d, "group": lambda width: nn.GroupNorm(width // 16, width)}[norm]
    if arch == "resnet10":
        resnet = torchvision.models.resnet
        net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], zero_init_residual=zero_init, norm_layer=layer)
    else:
        net = torchvision.models.get_model(arch, zero_init_residual=zero_init, norm_layer=layer)
    if stem == "small":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d  # same parameters and state-dict keys
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


class Conv2d(nn.Conv2d):
    """With square kernels and zeros as padding. On a CPU, a convolution to four pixels or fewer is one matrix product
    for each: of the pixels and the weights that meet there. The sum is the same. torch's own takes up to ten times as
    long, and in bf16 (2.11 to 2.14) it leaves a part of a gradient unwritten: that of a 3x3 kernel with a stride of 2,
    on a single pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        k, stride, padding, spans = self.kernel_size[0], self.stride[0], self.padding[0], []
        for size in x.shape[2:]:  # for each pixel of the result: its part of the image, and its part of the kernel
            starts = range(-padding, size + padding - k + 1, stride)
            spans.append([(slice(max(0, i), i + k), slice(max(0, -i), size - i)) for i in starts])
        rows, columns = spans
        if x.device.type != "cpu" or len(rows) * len(columns) > 4 or self.groups > 1 or self.dilation != (1, 1):
            return super().forward(x)
        x, w = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)  # n×H×W×C, C'×k×k×C
        y = [F.linear(x[:, i, j].flatten(1), w[:, a, b].flatten(1), self.bias) for i, a in rows for j, b in columns]
        return torch.stack(y, 1).unflatten(1, (len(rows), len(columns))).permute(0, 3, 1, 2)  # n×C'×H'×W'


# The backbone in files of weights: MoCo's queries; VICReg, Barlow Twins, DINO, solo-learn; SimSiam; SwAV, torchvision.
_PREFIXES = ("encoder_q.", "backbone.", "encoder.", "")
# What a ResNet and torchvision's vision transformer consist of, by their first convolution.
_RESNET = r"(conv1|bn1|layer[1-4])\..*"
_TRUNKS = {"conv1.weight": _RESNET, "conv_proj.weight": r"class_token|(conv_proj|encoder)\..*"}
_TRUNKS |= {f"{v[0]}.conv1.weight": rf"({v})\.{_RESNET}" for v in ("l|ab", "y|cbcr", "r|g|b")}  # of more/cmc.py


def read_weights(file: Path) -> dict[str, Tensor]:
    """The backbone's state dict, under torchvision's names and without `fc`, from a file of weights: of this project,
    torchvision, VICReg, Barlow Twins, SwAV, MoCo, SimSiam or DINO; and, from CPC's, `patches` (2,), the side and stride
    of the patches whose features are averaged. Names the heads it leaves out; refuses code.
    """
    try:
        # DINO's files hold their flags, too. Whatever torch warns of is said below, in one line.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise almost anything
        if isinstance(error, OSError) and error.filename:  # it was not opened
            refuse(f"{file} cannot be read: {error.strerror}")
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            refuse(f"{file} carries code, which is not run: {code[1]}; save its tensors alone, as a state dict")
        refuse(f"{file} is damaged, or not a file of weights as torch.save writes it")
    for container in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
    entries = state.items() if isinstance(state, dict) else ()
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): weight for name, weight in entries}
    prefix, first = next(((p, f) for p in _PREFIXES for f in _TRUNKS if p + f in state), ("", ""))
    if not first:
        refuse(f"{file} holds no ResNet: it has no entry conv1.weight, alone or behind a prefix known here")
    trunk = {name: re.match(f"{re.escape(prefix)}({_TRUNKS[first]})", name) for name in state}
    for name, weight in ((name, state[name]) for name, match in trunk.items() if match):
        dense = isinstance(weight, Tensor) and weight.layout == torch.strided and not weight.is_meta
        if not dense or not (weight.is_floating_point() or name.endswith("num_batches_tracked")):
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            refuse(f"{file}: {name} must be a dense tensor of floats, and is of {kind}")
    left_out = {re.match(f"({re.escape(prefix)})?[^.]*", name)[0] for name in state if not trunk[name]}
    grid = {name: state[name] for name in ("patches",) if name in state}
    left_out -= {"fc", "heads", *grid}
    if left_out and int(os.environ.get("RANK", 0)) == 0:
        tell(f"{file}: left out {', '.join(sorted(left_out))}", "stderr")
    return {match[1]: state[name] for name, match in trunk.items() if match} | grid


def misfits(net: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being loaded into `net`: one sentence per entry. Old files do not count batches."""
    wanted, given = ({name: list(w.shape) for name, w in weights.items()} for weights in (net.state_dict(), state))
    found = []
    for name in {**wanted, **given}:
        if name not in wanted:
            found.append(f"{name} has no place")
        elif name in given and given[name] != wanted[name]:
            found.append(f"{name} has shape {given[name]} in place of {wanted[name]}")
        elif name not in given and not name.endswith("num_batches_tracked"):
            found.append(f"{name} is missing")
    return found


def load_encoder(net: nn.Module, path: str) -> None:
    """Load an `encoder.pt`, or that of a run folder, into a backbone; every key but the classifier's must fit."""
    file = Path(path, "encoder.pt") if os.path.isdir(path) else Path(path)
    state = read_weights(file)
    state.pop("patches", None)
    if faults := misfits(net, state):
        norms = "one has BatchNorm, the other GroupNorm (CPC's)" if faults[0].startswith("bn1.running_mean ") else ""
        refuse(f"--init {file} does not fit --arch and --stem: {norms or faults[0]}")
    net.load_state_dict(state)
    if broken := [name for name, weight in net.state_dict().items() if not weight.isfinite().all()]:
        refuse(f"--init {file}: {broken[0]} is not finite")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as BYOL, Barlow Twins and VICReg use it.

    With g the gradient, p the weight tensor and m the momentum buffer, for each tensor:

        g <- g + weight_decay * p
        g <- g * eta * |p| / |g|      if both norms are positive
        m <- momentum * m + g;   p <- p - lr * m

    In a parameter group with `adapt=False`, as is usual for biases and BatchNorm, the first two lines are left out:
    neither decay nor adaptation. All tensors of a group are updated together, without a read from the device.

    With `clip` (LARC of apex, LARS of solo-learn) the second line is

        g <- g * min{eta * |p| / (|g without decay| + weight_decay * |p|) / lr, 1}

    so that lr cancels, and does no more than cap the step of a tensor whose gradient is small.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        clip: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "clip": clip}
        super().__init__(params, defaults | {"adapt": True})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = gradients = [p.grad for p in params]
            if group["adapt"]:
                # A copy: it is scaled in place below.
                updates = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
                p_norm, g_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, updates))
                ratio = group["eta"] * p_norm / g_norm
                if group["clip"]:
                    raw_norm = torch.stack(torch._foreach_norm(gradients))
                    ratio = group["eta"] * p_norm / (raw_norm + group["weight_decay"] * p_norm) / group["lr"]
                    ratio = ratio.clamp(max=1)  # infinite where lr is 0, as in the first step of a warm-up
                ratio = ratio.where((p_norm > 0) & (g_norm > 0), 1.0)
                torch._foreach_mul_(updates, list(ratio.unbind()))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


LARC = functools.partial(LARS, eta=0.02, clip=True)  # eta of apex and solo-learn


def cosine_schedule(step: int, total_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    """The value at `step` (from 0): linear from 0 to `peak` over the warm-up, then half a cosine to `final`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return final
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    return peak * cosine + final * (1 - cosine)


# ---------------------------------------------------------------------------------------------------- batches

# First word of a key, so that no two uses share their numbers: for numpy (seed, step) and (seed, step, 0) are one key.
ORDER, CROPS, VIEWS, NEIGHBOURS = 1, 2, 3, 4


class Draws:
    """Random numbers that belong to images, not to processes.

    Every method draws for the whole global batch of `total` images, from a generator seeded by `key` (integers, not
    negative; another key for each step and view), and returns `rows` of them, this rank's. Each call draws new ones.
    They are float64 on the CPU: so the primitives below know on the host which images they have to touch.
    """

    def __init__(self, key: tuple[int, ...], total: int, rows: slice = slice(None)):
        self.generator, self.total, self.rows = np.random.default_rng(key), total, rows

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(n, *shape) numbers in [low, high)."""
        numbers = self.generator.random((self.total, *shape))[self.rows]
        return torch.from_numpy(low + (high - low) * numbers)

    def chance(self, p: float) -> Tensor:
        """(n,) booleans, true with probability p."""
        return self.uniform(0, 1) < p

    def order(self, k: int) -> Tensor:
        """(n, k) random permutations of 0..k-1."""
        return self.uniform(0, 1, k).argsort(1)


class View(NamedTuple):
    """One view of this rank's images, cropped, and the dice that decide the rest: `augment(*view, args)`."""

    x: Tensor  # (n, 3, size, size) in [0, 1]
    draws: Draws


@dataclass
class Batch:
    """The views of one step; it unpacks into them. The rest tells of the global batch, on every rank."""

    views: list[View]
    index: Tensor  # (batch_size,) int64: which of the training images these are
    labels: Tensor  # (batch_size,) int64, -1 where unknown
    targets: Tensor  # (batch_size,) float64, NaN where unknown

    def __iter__(self) -> Iterator[View]:
        return iter(self.views)


def batches(
    data: Data, crops: list[Crop], steps: range, batch_size: int, seed: int, compute: Compute, workers: int = 0,
    neighbours: Tensor | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """For each of `steps`, this rank's slice of the batch, a view per crop. Every step takes the next batch_size images
    of its epoch's permutation; a short rest is left out. `workers` decode what is not in memory.

    With a table `neighbours`, (N, k) rows of `data` for its N images, each image of the batch makes way for one of its
    k, chosen at random: the batch that belongs to the one without. Their views are numbered on, and so look different.
    """
    (device, dtype, _), rows, first = compute, my_rows(batch_size), 0 if neighbours is None else len(crops)
    indices, ahead = itertools.tee(batch_indices(len(data), batch_size, steps, seed, neighbours))
    if data.pixels is None:
        keys = ([(epoch, i) for i in index[rows].tolist()] for epoch, index in ahead)
        loaded = ImageFiles(data, crops, seed, first).load(keys, workers)
    for step, (_, index) in zip(steps, indices, strict=True):
        index = torch.from_numpy(index)
        draws = [Draws((VIEWS, seed, step, first + view), batch_size, rows) for view in range(len(crops))]
        if data.pixels is not None:
            images = data.pixels[index[rows].to(device, non_blocking=True)].to(dtype) / 255
            xs = [random_resized_crop(images, d, crop) for d, crop in zip(draws, crops, strict=True)]
        else:
            views, used, errors = next(loaded)
            count_bad(data, errors)
            index = all_gather(used)  # a bad image is replaced by another, with its label and target
            xs = [view.to(device, non_blocking=True).to(dtype) / 255 for view in views]
        views = [View(x, d) for x, d in zip(xs, draws, strict=True)]
        yield Batch(views, index, data.labels[index], data.targets[index])


def batch_indices(
    total: int, batch_size: int, steps: range, seed: int, neighbours: Tensor | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, which of the `total` images the whole batch takes) for each step, the same for every process."""
    steps_per_epoch, order_of = total // batch_size, None
    for step in steps:
        epoch, start = step // steps_per_epoch, step % steps_per_epoch * batch_size
        if epoch != order_of:
            order, order_of = np.random.default_rng((ORDER, seed, epoch)).permutation(total), epoch
        index = order[start : start + batch_size]
        if neighbours is not None:
            column = np.random.default_rng((NEIGHBOURS, seed, step)).integers(neighbours.shape[1], size=batch_size)
            index = neighbours.numpy()[index, column].astype(index.dtype)
        yield epoch, index


# ----------------------------------------------------------------------------------------------- augmentation
#
# Batched: x is (n, 3, H, W), floats in [0, 1] on any device, and every parameter has one entry per image, on the CPU.
# Parameters go to the device without blocking: a copy that blocks would wait for all work that came before.


def random_boxes(draws: Draws, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """(n, 4) boxes (top, left, height, width) as torchvision's RandomResizedCrop draws them: ten tries of an area share
    uniform in `scale` and an aspect ratio log-uniform in 3/4 to 4/3; if none fits, the largest central box.
    """
    area = height * width * draws.uniform(*scale, 10)  # n×10
    aspect = draws.uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()  # n×10
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # n×10
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # n×1
    w, h, found = (t.gather(1, first)[:, 0] for t in (w, h, fits))  # n
    w = w.where(found, torch.tensor(min(width, round(height * 4 / 3))))
    h = h.where(found, torch.tensor(min(height, round(width / (3 / 4)))))
    top, left = (draws.uniform(0, 1) * (height - h + 1)).floor(), (draws.uniform(0, 1) * (width - w + 1)).floor()
    top, left = top.where(found, (height - h) // 2), left.where(found, (width - w) // 2)
    return torch.stack([top, left, h, w], 1).long()


def random_resized_crop(x: Tensor, draws: Draws, crop: Crop) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (n, 3, size, size): a random box of each image, resized, maybe flipped."""
    boxes = random_boxes(draws, *x.shape[2:], crop.scale)
    return resized_crop(x, boxes, crop.size, crop.interpolation, draws.chance(crop.flip))


def resized_crop(x: Tensor, boxes: Tensor, size: int, interpolation: str, flip: Tensor | None = None) -> Tensor:
    """Each image's box (top, left, height, width) resized with antialiasing, as torchvision's `resized_crop` does it,
    and flipped where `flip` says. Resampling is linear and separable, hence two small matrix products per image.
    """
    boxes = boxes.to(x.device, non_blocking=True)
    rows = resampling_matrix(boxes[:, 0], boxes[:, 2], x.shape[2], size, interpolation)  # n×s×H
    columns = resampling_matrix(boxes[:, 1], boxes[:, 3], x.shape[3], size, interpolation)  # n×s×W
    flip = per_image(torch.zeros(len(x)) if flip is None else flip, x)[..., 0] > 0
    columns = columns.flip(1).where(flip, columns)
    rows, columns = rows.to(x.dtype), columns.to(x.dtype)
    x = torch.bmm(x.flatten(1, 2), columns.mT).unflatten(1, x.shape[1:3])  # n×3×H×s
    x = rows[:, None] @ x  # n×3×s×s
    return x.clamp(0, 1)  # bicubic overshoots at edges


def resampling_matrix(start: Tensor, length: Tensor, pixels: int, size: int, interpolation: str) -> Tensor:
    """(n, size, pixels): row i holds the weights of output pixel i over the input pixels of [start, start + length)."""
    step = (length / size)[:, None, None]  # input pixels per output pixel
    centre = start[:, None, None] + step * (torch.arange(size, device=step.device) + 0.5)[:, None]  # n×size×1
    position = torch.arange(pixels, device=step.device) + 0.5
    t = ((position - centre) / step.clamp(min=1)).abs()  # n×size×pixels; shrinking widens the kernel: antialiasing
    if interpolation == "bicubic":  # Keys' kernel with a = -1/2
        near, far = (1.5 * t - 2.5) * t**2 + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = near.where(t < 1, far).where(t < 2, 0)
    elif interpolation == "bilinear":
        weights = (1 - t).clamp(min=0)
    else:
        raise ValueError(f"interpolation is bilinear or bicubic, not {interpolation}")
    weights = weights * ((position > start[:, None, None]) & (position < (start + length)[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def per_image(parameter: Tensor, x: Tensor) -> Tensor:
    """(n,) parameters on the CPU -> (n, 1, 1, 1) beside x. Images of whole numbers, 0 to 255, are a TypeError."""
    if not x.is_floating_point():
        raise TypeError(f"images must be floats in [0, 1], not {x.dtype}: divide them by 255 first")
    return parameter.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]


def gray(x: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, 1, H, W) luma with ITU-R 601 weights."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (n,) of the full circle, in true HSV; images with shift 0 are left alone."""
    index = shift.nonzero()[:, 0]
    if len(index) == 0:
        return x
    index, shift = index.to(x.device, non_blocking=True), per_image(shift[index], x)
    part = x[index]
    value, low = part.amax(1, keepdim=True), part.amin(1, keepdim=True)  # m×1×H×W
    chroma = value - low
    r, g, b = (((value - c) / chroma.where(chroma > 0, 1)) for c in part.split(1, 1))
    # Hue in sixths of the colour circle, counted from red: 0, 2 or 4 of the largest channel, and how far it is from it.
    hue = (b - g).where(r == 0, (2 + r - b).where(g == 0, 4 + g - r)) + 6 * shift  # m×1×H×W
    # Back: a channel is high within a sixth of its primary, low beyond two sixths, linear in between.
    third = per_image(torch.tensor([0, 4, 2]), x)[:, 0]  # 3×1×1
    angle = (hue + third).remainder(6)
    turned = low + chroma * ((angle - 3).abs() - 1).clamp(0, 1)  # m×3×H×W
    return x.index_copy(0, index, turned)


def adjust_color(
    x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, order: Tensor
) -> Tensor:
    """Colour jitter with given factors, (n,) each, applied to each image in its own `order`: (n, 4) permutations of
    0 brightness, 1 contrast, 2 saturation, 3 hue.

    The first three blend with black, with the mean grey and with the grey image, f·x + (1 - f)·other in [0, 1]; so one
    blend with per-image factors serves whichever of them is that image's turn. Factor 1 changes nothing.
    """
    factors = torch.stack([brightness, contrast, saturation, torch.ones_like(hue)], 1)  # n×4
    for turn in order.unbind(1):
        f = per_image(factors.gather(1, turn[:, None])[:, 0], x)
        grey = gray(x)
        other = grey.mean((2, 3), keepdim=True) * per_image(turn == 1, x) + grey * per_image(turn == 2, x)
        x = (f * x + (1 - f) * other).clamp(0, 1)
        x = adjust_hue(x, hue.where(turn == 3, 0))
    return x


def color_jitter(
    x: Tensor, draws: Draws, brightness: float, contrast: float, saturation: float, hue: float, p: float
) -> Tensor:
    """With probability p: factors uniform in 1 ± strength, hue shift uniform in ± hue, in random order."""
    jittered = draws.chance(p)
    factors = [draws.uniform(max(0, 1 - s), 1 + s).where(jittered, 1) for s in (brightness, contrast, saturation)]
    return adjust_color(x, *factors, draws.uniform(-hue, hue).where(jittered, 0), draws.order(4))


def grayscale(x: Tensor, chosen: Tensor) -> Tensor:
    """The images `chosen` (n,) in grey, three times."""
    return gray(x).where(per_image(chosen, x) > 0, x)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur with an odd `kernel_size` and standard deviations `sigma` (n,) in pixels, 0 for none; mirrored border."""
    if not x.is_floating_point():
        raise TypeError(f"images must be floats in [0, 1], not {x.dtype}: divide them by 255 first")
    index = sigma.nonzero()[:, 0]
    if len(index) == 0:
        return x
    sigma, index = (t.to(x.device, non_blocking=True) for t in (sigma[index], index))
    rows, columns = (blur_matrix(sigma, kernel_size, side).to(x.dtype) for side in x.shape[2:])
    part = torch.bmm(x[index].flatten(1, 2), columns.mT).unflatten(1, x.shape[1:3])
    return x.index_copy(0, index, rows[:, None] @ part)


def blur_matrix(sigma: Tensor, kernel_size: int, pixels: int) -> Tensor:
    """(n, pixels, pixels): row i holds the Gaussian weights around pixel i, those beyond the border mirrored."""
    radius = min(kernel_size // 2, pixels - 1)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)  # n×k
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(pixels, device=sigma.device)[:, None] + offset).abs()  # pixels×k; -1 mirrors to 1
    source = source.where(source < pixels, 2 * (pixels - 1) - source)
    matrix = kernel.new_zeros(len(sigma), pixels, pixels)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, pixels, -1))


def random_blur(x: Tensor, draws: Draws, p: float) -> Tensor:
    """With probability p: sigma uniform in 0.1 to 2 pixels, kernel of a tenth of the image (23 at 224)."""
    sigma = draws.uniform(0.1, 2.0).where(draws.chance(p), 0)
    return gaussian_blur(x, sigma, 2 * max(2, x.shape[-1] // 20) + 1)


def solarize(x: Tensor, chosen: Tensor, threshold: float = 0.5) -> Tensor:
    """The images `chosen` (n,) with every value from `threshold` upward inverted."""
    return (1 - x).where((per_image(chosen, x) > 0) & (x >= threshold), x)


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    mean, std = (per_image(torch.tensor(t, dtype=torch.float64), x)[:, 0] for t in (mean, std))  # 3×1×1
    return (x - mean) / std


# ------------------------------------------------------------------------------ neighbours, signs of collapse


def knn_scores(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, fractions, of the weighted nearest-neighbour classifier (Wu et al., arXiv 1805.01978).

    A test image takes the class with the largest sum of exp(cosine / temperature) over its k nearest training images.
    train_x (N, d), train_y (N,), test_x (M, d), test_y (M,), labels from 0; k is capped at N. In float32 or float64.
    """
    classes = int(max(train_y.max(), test_y.max())) + 1
    top1 = top5 = 0
    rows = min(1024, max(1, 2**28 // len(train_x)))  # a gigabyte of similarities at most
    with torch.no_grad(), torch.autocast(train_x.device.type, enabled=False):
        train_x, test_x = (F.normalize(full_precision(x), dim=1) for x in (train_x, test_x))
        for x, y in zip(test_x.split(rows), test_y.split(rows), strict=True):
            similarity, index = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)  # m×k
            votes = torch.zeros(len(x), classes, dtype=x.dtype, device=x.device)
            # Scaling all votes alike changes no winner: with the nearest at exp(0), no temperature overflows.
            votes.scatter_add_(1, train_y[index], ((similarity - similarity[:, :1]) / temperature).exp())
            most = votes.topk(min(5, classes), dim=1)
            hits = (most.indices == y[:, None]) & (most.values > 0)  # a class without a vote is no guess
            top1, top5 = top1 + hits[:, 0].sum().item(), top5 + hits.sum().item()
    return {"top1": top1 / len(test_y), "top5": top5 / len(test_y)}


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 of `knn_scores`."""
    return knn_scores(train_x, train_y, test_x, test_y, k, temperature)["top1"]


@torch.no_grad()
def embedding_health(z: Tensor) -> dict[str, float]:
    """Two signs of collapse in a batch of finite embeddings (n, d), n >= 2.

    embedding_std: standard deviation of z/|z| over the batch, averaged over dimensions; 1/sqrt(d) if isotropic, 0 if
    all are the same (arXiv 2011.10566, section 4.1). effective_rank: exp of the entropy of the normalised singular
    values of the first 512 z/|z|; 1 if all lie on a line, at most min(n, d) (Roy and Vetterli 2007; arXiv 2210.02885).
    """
    z = F.normalize(z.float(), dim=1)
    rows = z[:512].double()
    gram = rows @ rows.T if len(rows) < z.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-300)  # all embeddings 0: rank 1
    return {"embedding_std": z.std(0).mean().item(), "effective_rank": torch.special.entr(p).sum().exp().item()}


def signs_of_collapse(z: Tensor, embedding_std: float, effective_rank: float) -> dict[str, str]:
    """{sign: what it says} of embeddings z (n, d) that have collapsed, with their health; empty if they have not."""
    spread, scale, signs = embedding_std * z.shape[1] ** 0.5, z.float().std(0).mean().item(), {}
    if spread < 1 / 20:
        signs["std"] = f"the spread of the embeddings is {spread:.2g}, under 0.05 (1: isotropic)"
    # Healthy runs of all seven methods stay above 10; n embeddings have a rank of n at most.
    if effective_rank < min(5, z.shape[1] / 8, len(z) / 4):
        signs["rank"] = f"the embeddings have effective rank {effective_rank:.2f} in {z.shape[1]} dimensions"
    if scale < 1e-3:
        signs["scale"] = f"the embeddings shrink to one point: unnormalised std {scale:.2g}"
    return signs
