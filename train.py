"""Train and evaluate the capsule network of capsnet.py: `python train.py --help`.

A run has a folder of its own: metrics.csv, a line per epoch; checkpoint.pt, saved every ten
seconds, which `--resume` continues; and in the end weights.pt, which `--eval` scores, and
result.json.

Protocol: anything that is chosen is chosen with `--validate INSTANCE`, on training toys held out
whole. Without it all training images are used, and the test set is looked at once, at the end.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch._functorch.config
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

import data
from capsnet import ROUTINGS, CapsNet

EPOCHS = {"toys": 2, "mnist": 4, "smallnorb": 45}
LR = {"similarity": 1.2e-2, "connectionist": 3e-3, "em": 6e-3, "dynamic": 1.2e-2}  # else 3e-3
WARMUP, CLIP = 10, 1.0  # steps; norm of the gradient
ROUTING_LR = 5  # times --lr: lambda, theta and the like have further to go than W
KERNELS = ("kernel_logit", "log_width")  # at --lr itself: at five times that they soon die
EVAL_BATCH, SHOW_SECONDS = 32, 10  # progress is shown, and saved, as often
# Where and how to run: no checkpoint imposes these on its successor.
LOCAL = ("resume", "eval", "benchmark", "out", "data_dir", "device", "compile")
# Of the processes that torchrun starts: which one this is, and how many there are.
RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))


def fail(message):
    """A user's mistake, or the machine's: one line, no traceback."""
    sys.exit(f"train.py: {message}")


# ---------------------------------------------------------------------- options and checkpoints


def at_least(low, kind=int):
    """The type of an option that is a number."""
    def number(text):
        if not low <= (value := kind(text)) < math.inf:  # nan included
            raise argparse.ArgumentTypeError(f"{text}: expected {low} or more")
        return value
    return number


def assignment(text):
    name, _, value = text.partition("=")
    return name, json.loads(value)


def parse(argv=None):
    """-> (settings, the checkpoint that they came from or None)."""
    parser = argparse.ArgumentParser(description="Train a capsule network with learned routing.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # without the usage: one line
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", choices=data.SPECS, default="toys", help="toys need no download")
    add("--cameras", type=int, choices=(1, 2), default=1, help="of smallnorb, as channels")
    add("--routing", choices=ROUTINGS, default="similarity", help="the routing procedure")
    add("--iterations", type=at_least(0), help="if not the routing's own; 0 is the mean vote")
    add("--option", type=assignment, metavar="NAME=VALUE", action="append", default=[],
        help="for the routing's constructor, such as lambda1=1; may be repeated")
    add("--epochs", type=at_least(0), help=f"if not {EPOCHS}")
    add("--batch-size", type=at_least(1), default=16, help="images per step")
    add("--lr", type=at_least(0, float), help=f"Adam's highest learning rate, if not {LR}")
    add("--validate", type=int, metavar="INSTANCE",
        help="hold out this training instance of every class, and leave the test set alone")
    add("--crops", type=at_least(1), default=1, help="score N x N crops, 1: the central one")
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 autocast")
    add("--compile", action=switch, default=bool(shutil.which(os.environ.get("CXX", "g++"))),
        help="torch.compile the routing, on a GPU the network: faster, after a minute")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")
    add("--data-dir", default="datasets", help="where the data sets are, or will be put")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--out", type=Path, help="folder for the run, if not a new one in runs/")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue this run with its settings")
    add("--eval", type=Path, metavar="WEIGHTS", help="score these weights")
    add("--benchmark", action="store_true", help="time this routing on random images, and stop")
    args, checkpoint = parser.parse_args(argv), None
    if args.resume or args.eval:
        checkpoint = load_checkpoint(args.resume or args.eval)
        if args.resume and "optimizer" not in checkpoint:
            fail(f"--resume {args.resume}: weights only, expected the checkpoint.pt of a run")
        parser.set_defaults(**checkpoint["settings"])
        if args.eval:  # the test set, unless this command line says otherwise
            parser.set_defaults(validate=None)
        args = parser.parse_args(argv)
        args.option = [*dict(args.option).items()]  # the checkpoint's, and those given again
        fixed = ("dataset", "iterations", "option", "batch_size", "validate", "seed")
        for name in fixed if args.resume else ():
            if vars(args)[name] != (old := checkpoint["settings"][name]):
                fail(f"--{name.replace('_', '-')} {vars(args)[name]}: {args.resume} was started "
                     f"with {old}")
    args.epochs = EPOCHS[args.dataset] if args.epochs is None else args.epochs
    args.lr = LR.get(args.routing, 3e-3) if args.lr is None else args.lr
    if args.iterations == 0 and args.routing in ("em", "connectionist"):
        fail(f"--iterations 0: {args.routing} routing gives no activations without iterations")
    if "iterations" in dict(args.option):
        fail("--option iterations: expected as --iterations")
    return args, checkpoint


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["settings"]["dataset"], checkpoint["model"]
        return checkpoint
    except Exception as error:  # the unpickler may raise anything on a damaged or foreign file
        fail(f"{path}: not a checkpoint of this program ({type(error).__name__})")


def settings_of(args):
    return {name: value for name, value in vars(args).items() if name not in LOCAL}


def write(path, save):
    """save(name) beside `path`, then rename: it is whole or as it was. One process of several."""
    if RANK == 0:
        with data.written_aside(path) as aside:
            save(aside)


# ------------------------------------------------------------------------- model and evaluation


def build(args, checkpoint):
    spec = data.SPECS[args.dataset]
    options = {} if args.iterations is None else {"iterations": args.iterations}
    torch.manual_seed(args.seed % 2**64)
    try:
        net = CapsNet((args.cameras, spec.crop, spec.crop), len(spec.classes), args.routing,
                      **options, **dict(args.option))
    except (TypeError, ValueError, RuntimeError) as error:
        fail(f"--option {args.option}: not for {args.routing} routing "
             f"({str(error).splitlines()[0]})")
    if checkpoint:
        try:
            net.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError, AttributeError):
            fail(f"{args.resume or args.eval}: weights of another network than "
                 f"--dataset {args.dataset} --routing {args.routing} asks for")
    # On a CPU each process has its own batch statistics; those of the first are saved.
    if WORLD > 1 and args.device != "cpu":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(args.device)
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # where the compiler fails, run as written
        if torch.device(args.device).type == "cuda" and WORLD == 1:
            net.compile(mode="reduce-overhead")  # as CUDA graphs, or launching takes the time
        else:
            # Keep half of what backward would like to find: EM routing trains 1.3 times as fast.
            torch._functorch.config.activation_memory_budget = 0.5
            for layer in (net.caps1, net.caps2):  # class_caps has 2 % of the votes
                layer.routing.compile()
    return net


def predict(forward, images, args):
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
        return forward(images)[1].float()


@torch.no_grad()
def evaluate(net, dataset, args):
    """-> confusion counts (true class, predicted class), on the central crop or several."""
    spec = data.SPECS[args.dataset]
    n = len(spec.classes)
    confusion = torch.zeros(n * n, dtype=torch.int64, device=args.device)
    for buffer in net.buffers() if WORLD > 1 else ():  # batch statistics: as they will be saved
        dist.broadcast(buffer, 0)
    net.eval()
    for images, labels in zip(*(part[RANK::WORLD].split(EVAL_BATCH) for part in dataset[:2])):
        crops = data.crops(data.standardise(images), spec.crop, args.crops)
        # net.forward: on a GPU net(crop) would compile the network again, for every batch size.
        logits = torch.stack([predict(net.forward, crop, args) for crop in crops])
        # The mean of the crops' probabilities, as a logarithm: rounding makes no ties there.
        predicted = logits.log_softmax(2).logsumexp(0).argmax(1)
        confusion += torch.bincount(labels * n + predicted, minlength=n * n)
    if WORLD > 1:
        dist.all_reduce(confusion)
    return confusion.view(n, n).cpu()


def error_of(confusion):
    """Percent."""
    return 100 - 100 * confusion.trace().item() / confusion.sum().item()


def show(confusion, classes, name):
    total, right = confusion.sum().item(), confusion.trace().item()
    print(f"{name} error {error_of(confusion):.2f} %: {total - right} of {total} images")
    width = max(map(len, (*classes, str(confusion.max().item())))) + 2
    print("true, predicted".ljust(16) + "".join(c.rjust(width) for c in classes))
    for label, row in zip(classes, confusion.tolist()):
        print(label.ljust(16) + "".join(str(n).rjust(width) for n in row))


def new_folder(stem):
    """Make stem-1, or the first number that is free: runs that start together have one each."""
    for n in count(1):
        with contextlib.suppress(FileExistsError):
            if RANK == 0:
                os.makedirs(f"{stem}-{n}")
            return Path(f"{stem}-{n}")


def keep_freed_memory():
    """glibc returns large freed blocks to the system, and every step would get them anew, page by
    page: a training step on a CPU takes 1.3 times as long."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays ours
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all blocks come from that heap


def benchmark(args):
    """Print the speed of training steps and of inference on random images, and the memory."""
    net, size, device = build(args, None), args.batch_size, torch.device(args.device)
    images = torch.randn(size, *net.image_shape, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(predict(net, images, args), labels).backward()
        optimizer.step()

    def rate(call):
        call()  # compiles
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return f"{size / timer.blocked_autorange(min_run_time=10).median:.1f} images/s"

    training = rate(step)
    net.eval()
    with torch.no_grad():
        inference = rate(lambda: predict(net.forward, images, args))
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        import resource  # only Unix has it
        name = f"{torch.get_num_threads()} CPU threads"
        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{args.routing}, batches of {size}, {name}: training {training}, inference {inference}, "
          f"at most {memory / 1e6:.0f} MB of memory")


# -------------------------------------------------------------------------------------- training


def train(net, fit, held_out, args, checkpoint, path):
    """Train to the last epoch, saving to `path`; with --validate score `held_out` after each.

    All that the next step depends on is in the checkpoint: on one CPU thread a resumed run repeats
    the uninterrupted one bit for bit. Returns the rows of metrics.csv.
    """
    spec, size = data.SPECS[args.dataset], args.batch_size
    per_epoch = max(1, len(fit.labels) // size)  # steps: a last batch that is not full is left out
    model = net if WORLD == 1 else nn.parallel.DistributedDataParallel(
        net, find_unused_parameters=args.iterations == 0)
    fast = {name: p for name, p in net.named_parameters()
            if ".routing." in name and not name.endswith(KERNELS)}
    slow = [p for name, p in net.named_parameters() if name not in fast]
    optimizer = torch.optim.Adam([{"params": slow, "scale": 1},
                                  {"params": list(fast.values()), "scale": ROUTING_LR}])
    noise = torch.Generator(args.device)  # of the augmentation
    tally = torch.zeros(3, device=args.device)  # this epoch's sums: loss, errors, images
    step, rows, seconds = 0, [], 0.0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        tally.copy_(checkpoint["tally"])
        step, rows, seconds = (checkpoint[name] for name in ("step", "rows", "seconds"))
        if step > args.epochs * per_epoch:
            fail(f"--epochs {args.epochs}: {args.resume} has {step / per_epoch:.4g} behind it")
    start = time.time() - seconds  # of the run, as if it had never been stopped

    def save():
        state = dict(settings=settings_of(args), model=net.state_dict(),
                     optimizer=optimizer.state_dict(), tally=tally, step=step, rows=rows,
                     seconds=time.time() - start)
        write(path, lambda aside: torch.save(state, aside))

    if not checkpoint:
        save()  # a folder that cannot be written shows now

    for epoch in range(step // per_epoch, args.epochs):
        generator = torch.Generator().manual_seed((1000 * args.seed + epoch) % 2**32)
        order = torch.randperm(len(fit.labels), generator=generator).to(args.device)
        net.train()
        shown = None  # time and step of the last line; at first of a step that may compile
        for batch in order.split(size)[step % per_epoch:per_epoch]:
            done = step / (args.epochs * per_epoch)
            for group in optimizer.param_groups:  # a short rise, then a straight line to zero
                group["lr"] = args.lr * group["scale"] * min(1, (step + 1) / WARMUP) * (1 - done)
            noise.manual_seed((1_000_003 * args.seed + step) % 2**32)  # a CPU uses no more bits
            images = data.augment(data.standardise(fit.images[batch]), spec, noise)
            # All processes augment the whole batch, so their number does not change the images.
            images, labels = images[RANK::WORLD], fit.labels[batch][RANK::WORLD]
            optimizer.zero_grad()  # first: a CUDA graph overwrites the gradients it returned
            logits = predict(model, images, args)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            if not norm.isfinite():  # stop before it reaches the weights
                fail(f"step {step + 1}: the loss is {loss.item()}, its gradient not finite; what "
                     f"is saved in {path} is from before")
            optimizer.step()
            step += 1
            wrong = (logits.argmax(1) != labels).sum()
            sums = loss.new_tensor([loss.item() * len(labels), wrong, len(labels)])
            if WORLD > 1:
                dist.all_reduce(sums)
            tally += sums
            now = time.time()
            shown = shown or (now, step)
            if step > shown[1] and (step % per_epoch == 0 or now - shown[0] > SHOW_SECONDS):
                rate = (step - shown[1]) * size / (now - shown[0])
                shown = now, step
                left = (args.epochs * per_epoch - step) * size / rate
                print(f"epoch {epoch + 1}/{args.epochs}  {rate:.0f} images/s  loss "
                      f"{tally[0] / tally[2]:.4f}  training error {100 * tally[1] / tally[2]:.2f} %"
                      f"  {left / 60:.0f} min left", flush=True)
                if step % per_epoch:  # at the end of an epoch below, with its row
                    save()
        row = dict(epoch=epoch + 1, step=step, loss=(tally[0] / tally[2]).item(),
                   training_error=(100 * tally[1] / tally[2]).item())
        if args.validate is not None:
            row["validation_error"] = error_of(evaluate(net, held_out, args))
            print(f"validation error {row['validation_error']:.2f} %", flush=True)
        rows.append({**row, "seconds": round(time.time() - start, 1)})
        tally.zero_()
        # Before the checkpoint: a run that is killed between the two repeats this epoch.
        lines = [",".join(map(str, cells)) for cells in (rows[0], *(r.values() for r in rows))]
        write(path.with_name("metrics.csv"),
              lambda aside: aside.write_text("\n".join(lines) + "\n"))
        save()
    return rows


def main(argv=None):
    args, checkpoint = parse(argv)
    keep_freed_memory()
    if WORLD > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do anyway
    if args.benchmark:
        return benchmark(args)
    if WORLD > 1:  # the first process of torchrun downloads, prints and writes
        dist.init_process_group(timeout=timedelta(hours=3))  # as long as a slow download may take
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
            dist.barrier()
    splits = data.load(args.dataset, args.data_dir, args.cameras)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    if args.validate is not None:
        splits = data.hold_out(splits[0], args.validate)
    fit, held_out = (data.Dataset(*(part.to(args.device) for part in split)) for split in splits)
    net, classes = build(args, checkpoint), data.SPECS[args.dataset].classes
    name = "test" if args.validate is None else "validation"
    if args.eval:
        return show(evaluate(net, held_out, args), classes, name)

    if args.out and any((args.out / name).exists() for name in ("checkpoint.pt", "weights.pt")):
        fail(f"--out {args.out}: holds a run already; --resume continues its checkpoint.pt")
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size}: expected a multiple of the {WORLD} processes")
    path = args.resume or (
        args.out or new_folder(f"runs/{args.dataset}-{args.routing}")) / "checkpoint.pt"
    out = path.parent
    print(f"{args.routing} routing on {args.dataset}: {len(fit.labels)} training images, "
          f"{sum(p.numel() for p in net.parameters())} parameters, {args.device}, run in {out}"
          + ", compiling first, for up to a minute" * args.compile, flush=True)
    try:
        rows = train(net, fit, held_out, args, checkpoint, path)
    except KeyboardInterrupt:
        fail(f"interrupted; to continue: python train.py --resume {path} "
             f"--data-dir {args.data_dir}")
    show(confusion := evaluate(net, held_out, args), classes, name)
    result = {f"{name}_error": error_of(confusion), "seconds": rows[-1]["seconds"] if rows else 0,
              "settings": settings_of(args), "confusion": confusion.tolist()}
    write(out / "result.json", lambda path: path.write_text(json.dumps(result) + "\n"))
    # From the CPU, so that torch.load opens them on a machine without this device.
    weights = {"settings": settings_of(args), "model": net.cpu().state_dict()}
    write(out / "weights.pt", lambda path: torch.save(weights, path))
    print(f"epochs in {out / 'metrics.csv'}; to score again: python train.py --eval "
          f"{out / 'weights.pt'}; next: python train.py --help; pictures: results/figures")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except (data.DataError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:  # before or after the training
        fail("interrupted")
    if dist.is_initialized():  # DistributedDataParallel leaves gloo's threads behind, and one that
        sys.stdout.flush()  # frees a tensor while the interpreter shuts down aborts the process
        dist.destroy_process_group()
        os._exit(0)
