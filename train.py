"""Train and evaluate the capsule network of capsnet.py: `python train.py --help`.

A run has a folder of its own: metrics.csv, a line per epoch; checkpoint.pt, which `--resume`
continues; and in the end weights.pt, which `--eval` scores, and result.json.

Protocol: anything that is chosen is chosen with `--validate`, on training instances held out
whole. Without it all training images are used, and the test set is looked at once, at the end.
"""

import argparse
import csv
import ctypes
import json
import os
import shutil
import signal
import statistics
import sys
import time
from datetime import timedelta
from itertools import accumulate, count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from capsnet import ROUTINGS, CapsNet, spread_loss

EPOCHS = {"toys": 1, "mnist": 5, "smallnorb": 30}
# Where and how to run, not what is trained: a checkpoint does not impose these on its successor.
LOCAL = ("resume", "eval", "benchmark", "out", "data_dir", "device", "compile", "max_votes",
         "recompute")
# On a CPU, few votes at a time stay near the cache; the LSTM's gates are 4 times as many.
CPU_VOTES = {"connectionist": 660_000}
EVAL_BATCH = 128
# Of the processes that torchrun starts: which one this is, and how many there are.
RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))


def fail(message):
    """A user's mistake, or the machine's: one line, no traceback."""
    sys.exit(f"train.py: {message}")


# ---------------------------------------------------------------------- options and checkpoints


def parse(argv=None):
    """-> (settings, the checkpoint they came from or None)."""
    parser = argparse.ArgumentParser(description="Train a capsule network with learned routing.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # without the usage, which is 20 lines
    add, compiler = parser.add_argument, shutil.which(os.environ.get("CXX", "g++"))
    add("--dataset", choices=data.SPECS, default="toys", help="toys need no download")
    add("--routing", choices=ROUTINGS, default="similarity", help="the routing procedure")
    add("--iterations", type=int, default=3, help="of the routing")
    add("--option", metavar="NAME=NUMBER", action="append", default=[],
        help="for the routing's constructor, such as lambda1=1 or mean_shift=1; may be repeated")
    add("--loss", choices=("cross-entropy", "spread"), default="cross-entropy", help="of logits")
    add("--epochs", type=int, help=f"if not {EPOCHS}")
    add("--batch-size", type=int, default=16, help="images per step")
    add("--lr", type=float, default=6e-3, help="Adam's learning rate, after the warm-up")
    add("--lr-end", type=float, default=0.03, help="exponential decay ends at this share of --lr")
    add("--warmup", type=int, default=10, help="steps in which the learning rate rises")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--cameras", type=int, default=1, help="of smallnorb, as channels: 1 or 2")
    add("--brightness", type=float, help="of the augmentation, if not as in data.py")
    add("--contrast", type=float, help="of the augmentation, if not as in data.py")
    add("--limit", type=int, help="train on so many images, drawn at random")
    add("--validate", action="store_true", help="hold out training instances, leave the test alone")
    add("--crops", type=int, default=1, help="score N x N crops of an image, 1: the central one")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action=argparse.BooleanOptionalAction, default=compiler is not None,
        help="fuse the routing with torch.compile: faster, after half a minute")
    add("--max-votes", type=int, help="vote entries routed at a time (CPU: 2.7 million)")
    add("--recompute", action="store_true", help="votes anew in backward: little memory, slower")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")
    add("--data-dir", default="datasets", help="where the data sets are, or will be put")
    add("--out", help="folder for the run, if not a new one in runs/")
    add("--resume", metavar="CHECKPOINT", help="continue this run with its settings")
    add("--eval", metavar="CHECKPOINT", help="score these weights")
    add("--benchmark", action="store_true", help="time all routings on random images, and stop")
    args, checkpoint = parser.parse_args(argv), None
    if path := args.resume or args.eval:
        checkpoint = load_checkpoint(path)
        if args.resume and "optimizer" not in checkpoint:
            fail(f"--resume {path}: weights only, expected the checkpoint.pt of a run")
        argv = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([*as_arguments(checkpoint["settings"]), *argv])
    if args.epochs is None:
        args.epochs = EPOCHS[args.dataset]
    for name in ("brightness", "contrast"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(data.SPECS[args.dataset], name))
    for name, least in dict(iterations=0, epochs=0, batch_size=1, brightness=0, contrast=0,
                            crops=1, limit=1, max_votes=1).items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # nan included
            fail(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    return args, checkpoint


def as_arguments(settings):
    """A checkpoint's settings as a command line, so that they are checked like a user's."""
    for name, value in settings.items():
        if name not in LOCAL and value is not None and value is not False:
            for item in value if isinstance(value, list) else [value]:
                yield f"--{name}".replace("_", "-") + ("" if item is True else f"={item}")


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint["settings"], dict) or "model" not in checkpoint:
            raise ValueError
        return checkpoint
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        fail(f"{path}: {error.strerror}")
    except Exception as error:  # the unpickler may raise anything on a damaged or foreign file
        fail(f"{path}: not a checkpoint of this program ({type(error).__name__})")


def settings_of(args):
    return {name: value for name, value in vars(args).items() if name not in LOCAL}


def write_aside(path, write):
    """Write beside `path`, then rename: whatever happens, `path` is whole. Of several processes
    the first alone writes."""
    if RANK > 0:
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        free = shutil.disk_usage(path.parent).free / 1e6
        fail(f"{path} could not be written ({' '.join(str(error).split())}; {free:.1f} MB free on "
             "the disk); what was there before is untouched")
    finally:
        aside.unlink(missing_ok=True)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# --------------------------------------------------------------------------- model and evaluation


class AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class SyncBatchNorm(nn.BatchNorm2d):
    """Statistics over the batches of all processes. PyTorch's own needs GPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too short for a sum
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = AllReduce.apply(moments) / WORLD
        var = (square - mean**2).clamp_min(0)
        n = WORLD * x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def synchronised(norm):
    """A batch normalisation with the same state, over all processes."""
    twin = SyncBatchNorm(norm.num_features)
    twin.load_state_dict(norm.state_dict())
    return twin


def build(args, checkpoint):
    spec = data.SPECS[args.dataset]
    options = {} if args.routing == "mean" else {"iterations": args.iterations}
    for text in args.option:
        name, _, value = text.partition("=")
        try:
            options[name] = float(value)
        except ValueError:
            fail(f"--option {text}: expected NAME=NUMBER")
    max_votes = args.max_votes
    if max_votes is None and args.device == "cpu":
        max_votes = CPU_VOTES.get(args.routing, 2_700_000)
    torch.manual_seed(args.seed)
    try:
        net = CapsNet((args.cameras, spec.crop, spec.crop), len(spec.classes), args.routing,
                      max_votes=max_votes, recompute=args.recompute, **options)
    except TypeError as error:
        fail(f"--option {' '.join(args.option)}: not for {args.routing} routing ({error})")
    if checkpoint:
        try:
            net.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError, AttributeError):
            fail(f"{args.resume or args.eval}: weights of another network than "
                 f"--dataset {args.dataset} --routing {args.routing} asks for")
    if WORLD > 1:
        net.conv[2] = synchronised(net.conv[2])
    net.to(args.device)
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # where the compiler fails, run as written
        # Keep half of what backward would like to find: the rest is computed again on the way.
        torch._functorch.config.activation_memory_budget = 0.5
        for layer in net.caps[:-1]:  # the class layer has 1 % of the votes: not worth the wait
            layer.routing.compile()
    return net


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


@torch.no_grad()
def evaluate(net, dataset, args):
    """-> confusion counts (true class, predicted class), on the central crop or several."""
    spec = data.SPECS[args.dataset]
    n = len(spec.classes)
    confusion = torch.zeros(n * n, dtype=torch.int64, device=args.device)
    net.eval()
    mine = (part[RANK::WORLD].split(EVAL_BATCH) for part in (dataset.images, dataset.labels))
    for images, labels in zip(*mine):
        crops = data.crops(data.standardise(images), spec.crop, args.crops)
        with autocast(args):
            logits = [net(crop)[1].float() for crop in crops]
        # The mean of the crops' probabilities, as a logarithm: rounding makes no ties there.
        score = torch.stack(logits).log_softmax(2).logsumexp(0)
        confusion += torch.bincount(labels * n + score.argmax(1), minlength=n * n)
    if WORLD > 1:
        dist.all_reduce(confusion)
    return confusion.view(n, n).cpu()


def error_of(confusion):
    """Percent."""
    return 100 - 100 * confusion.trace().item() / confusion.sum().item()


def show(confusion, classes, name):
    wrong = int(confusion.sum() - confusion.trace())
    print(f"{name} error {error_of(confusion):.2f} %: {wrong} of {int(confusion.sum())} images")
    width = max(map(len, (*classes, str(int(confusion.max()))))) + 2
    print("true, predicted".ljust(16) + "".join(c.rjust(width) for c in classes))
    for label, row in zip(classes, confusion.tolist()):
        print(label.ljust(16) + "".join(str(n).rjust(width) for n in row))


def keep_freed_memory():
    """glibc returns large freed blocks to the system, and every step would get them anew, page by
    page: a sixth of a training step of similarity routing on a CPU, a third of EM routing."""
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays ours
        mallopt(-4, 0)  # M_MMAP_MAX: all blocks come from that heap


# --------------------------------------------------------------------------------- benchmark


def seconds_per_call(call, device, least=5, budget=10.0):
    """The median over as many calls as fit in `budget` seconds, after two to warm up."""
    times = []
    while len(times) < least + 2 or sum(times[2:]) < budget:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def peak_bytes(call, device):
    """The most bytes of tensors held during `call`, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())),
                          initial=0))


def benchmark(args):
    """Print a table: full training steps (forward, loss, backward, Adam) and inference."""
    device, spec, batch = torch.device(args.device), data.SPECS[args.dataset], args.batch_size
    images = torch.randn(batch, args.cameras, spec.crop, spec.crop, device=device)
    labels = torch.randint(len(spec.classes), (batch,), device=device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{torch.get_num_threads()} CPU threads")
    print(f"{name}, torch {torch.__version__}, batches of {batch}, {tuple(images.shape[1:])} "
          f"images, {args.iterations} iterations, {'compiled' if args.compile else 'as written'}"
          f"{', bfloat16' if args.amp else ''}\n")
    print("| routing | training, images/s | inference, images/s | peak MB, training "
          "| training step in copies of the votes |\n|---|---|---|---|---|")
    net = CapsNet(images.shape[1:], len(spec.classes), "mean").to(device)  # for the votes' number
    reports = net(images[:1], return_routing=True)[2]
    votes = torch.ones(batch * sum(r["compatibility"].numel() for r in reports), 16, device=device)
    copy = torch.empty_like(votes)
    for args.routing in ROUTINGS:
        torch.compiler.reset()  # it compiles one method, here `Routing.forward`, only so many times
        net = build(args, None)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

        def step():
            with autocast(args):
                logits = net(images)[1].float()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()

        @torch.no_grad()
        def infer():
            with autocast(args):
                net(images)

        unit = seconds_per_call(lambda: copy.copy_(votes), device, budget=1.0)
        training = seconds_per_call(step, device)
        peak = peak_bytes(step, device)
        net.eval()
        print(f"| {args.routing} | {batch / training:.1f} "
              f"| {batch / seconds_per_call(infer, device):.1f} | {peak / 1e6:.0f} "
              f"| {training / unit:.0f} |", flush=True)


# ---------------------------------------------------------------------------------- training


class Stopped(Exception):
    """SIGINT or SIGTERM arrived, and the run is saved."""


@torch.no_grad()
def first_not_finite(net, images, loss):
    """The part of the network whose output, or else gradient, is the first that is not finite."""
    bad = []
    for name, part in net.named_modules():
        if part in (net.conv, net.primary, *net.caps):
            part.register_forward_hook(lambda module, inputs, outputs, name=name: bad.extend(
                name for x in outputs if not x.isfinite().all()))
    net(images)
    if not loss.isfinite():
        bad.append("the loss")
    bad += [f"the gradient of {name}" for name, p in reversed(list(net.named_parameters()))
            if p.grad is not None and not p.grad.isfinite().all()]  # backward runs from the end
    return bad[0] if bad else "the norm of the gradient"


def train(net, fit, held_out, args, checkpoint, out):
    """Train to the last epoch, saving on the way; `held_out` is scored after every epoch.

    All that the next step depends on is in the checkpoint, so a resumed run repeats the
    uninterrupted one bit for bit on the same machine. Returns the rows of metrics.csv and the
    last confusion counts, None without `held_out`.
    """
    spec, device = data.SPECS[args.dataset], torch.device(args.device)
    size, per_epoch = args.batch_size, max(1, len(fit.labels) // args.batch_size)
    steps = args.epochs * per_epoch
    if WORLD > 1 and (size % WORLD or len(fit.labels) < size):
        fail(f"--batch-size {size}: expected a multiple of the {WORLD} processes, and at most the "
             f"{len(fit.labels)} training images")
    model = net if WORLD == 1 else nn.parallel.DistributedDataParallel(
        net, find_unused_parameters=args.iterations == 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    noise = torch.Generator(device).manual_seed(args.seed)  # of the augmentation
    tally = torch.zeros(3, device=device)  # this epoch's sums: loss, errors, images
    step, rows, earlier = 0, [], 0.0
    if checkpoint:
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            noise.set_state(checkpoint["noise"])
            tally.copy_(checkpoint["tally"])
            step, rows = int(checkpoint["step"]), [dict(row) for row in checkpoint["rows"]]
            earlier = float(checkpoint["seconds"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            fail(f"{args.resume}: not a checkpoint of this program ({type(error).__name__})")
    confusion = None
    first, start, shown, saved = step, time.time(), time.time(), time.time()

    def seconds():
        return earlier + time.time() - start

    def save():
        state = dict(settings=settings_of(args), model=net.state_dict(),
                     optimizer=optimizer.state_dict(), noise=noise.get_state(), tally=tally,
                     step=step, rows=rows, seconds=seconds())
        write_aside(out / "checkpoint.pt", lambda path: torch.save(state, path))

    def progress(end):
        loss, wrong, images = tally.tolist()
        rate = (step - first) * size / (time.time() - start)
        left = time.gmtime((steps - step) * size / rate)
        print(f"epoch {(step - 1) // per_epoch + 1}/{args.epochs}  {rate:.0f} images/s  "
              f"loss {loss / images:.4f}  training error {100 * wrong / images:.2f} %  "
              f"left {left.tm_yday - 1} d {time.strftime('%H:%M:%S', left)}", end=end, flush=True)

    signals = []
    before = {s: signal.signal(s, lambda number, _: signals.append(number))
              for s in (signal.SIGINT, signal.SIGTERM)}
    while step < steps:
        epoch, done = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(fit.labels), generator=generator).to(device)
        net.train()
        for batch in order.split(size)[done:per_epoch]:
            for group in optimizer.param_groups:
                rise = min(1.0, (step + 1) / max(1, args.warmup))
                group["lr"] = args.lr * rise * args.lr_end ** (step / steps)
            images = data.augment(data.standardise(fit.images[batch]), spec.crop,
                                  args.brightness, args.contrast, noise)
            # All processes augment the whole batch, so their number does not change the images.
            images, labels = images[RANK::WORLD], fit.labels[batch][RANK::WORLD]
            with autocast(args):
                logits = model(images)[1].float()
            if args.loss == "spread":
                loss = spread_loss(logits, labels, margin=0.2 + 0.7 * min(1, 2 * step / steps))
            else:
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            try:  # before it reaches the weights
                torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip, error_if_nonfinite=True)
                finite = loss.isfinite()
            except RuntimeError:
                finite = False
            if not finite:
                last = out / "checkpoint.pt"
                fail(f"step {step + 1}: a number that is not finite, first in "
                     f"{first_not_finite(net, images, loss)}; last good checkpoint: "
                     f"{last if last.exists() else 'none yet'}")
            optimizer.step()
            step += 1
            wrong, stop = (logits.argmax(1) != labels).sum(), bool(signals)
            sums = torch.stack([loss.detach() * len(labels), wrong, wrong.new_tensor(len(labels)),
                                wrong.new_tensor(stop)])
            if WORLD > 1:
                dist.all_reduce(sums)
                stop = sums[3] > 0  # a signal to one process stops all, after the same step
            tally += sums[:3]
            if stop:
                save()
                raise Stopped
            if time.time() - shown > (1 if sys.stdout.isatty() else 30):
                progress("\r" if sys.stdout.isatty() else "\n")
                shown = time.time()
            if time.time() - saved > 120:
                save()
                saved = time.time()
        progress("\n")
        loss, wrong, images = tally.tolist()
        row = dict(epoch=epoch + 1, step=step, loss=loss / images,
                   training_error=100 * wrong / images)
        if held_out:
            confusion = evaluate(net, held_out, args)
            row["validation_error"] = error_of(confusion)
            print(f"validation error {row['validation_error']:.2f} %", flush=True)
        rows.append({**row, "seconds": round(seconds(), 1)})
        tally.zero_()
        # Before the checkpoint: a run that is killed between the two repeats this epoch.
        write_aside(out / "metrics.csv", lambda path: write_csv(path, rows))
        save()
    for s, handler in before.items():
        signal.signal(s, handler)
    return rows, confusion


def join(args):
    """Become one of the processes of torchrun; only the first prints, downloads and writes."""
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group(timeout=timedelta(hours=3))  # as long as a slow download may take
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        dist.barrier()


def leave():
    """End as one of the processes of torchrun. DistributedDataParallel keeps gloo's threads alive
    beyond `destroy_process_group`; one that frees a tensor while the interpreter shuts down aborts
    the process, so it does not shut down."""
    sys.stdout.flush()
    dist.destroy_process_group()
    os._exit(0)


def main(argv=None):
    args, checkpoint = parse(argv)
    keep_freed_memory()
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.benchmark:
        return benchmark(args)
    if WORLD > 1:
        join(args)
    splits = data.load(args.dataset, args.data_dir, args.cameras)
    if WORLD > 1 and RANK == 0:
        dist.barrier()  # the others wait in `join` until the cache is there
    if args.validate:
        splits = data.split_validation(args.dataset, splits[0])
    if args.limit:
        generator = torch.Generator().manual_seed(args.seed)
        keep = torch.randperm(len(splits[0].labels), generator=generator)[:args.limit]
        splits = data.Dataset(*(part[keep] for part in splits[0])), splits[1]
    fit, held_out = (data.Dataset(*(part.to(args.device) for part in split)) for split in splits)
    net = build(args, checkpoint)
    name, classes = "validation" if args.validate else "test", data.SPECS[args.dataset].classes
    if args.eval:
        return show(evaluate(net, held_out, args), classes, name)

    fresh = (Path("runs") / f"{args.dataset}-{args.routing}-{n}" for n in count(1))
    if args.resume:
        out = Path(args.resume).parent
    elif args.out:
        out = Path(args.out)
    else:
        out = next(folder for folder in fresh if not folder.exists())
    if not args.resume and (out / "checkpoint.pt").exists():
        fail(f"--out {out}: holds a run already; --resume {out / 'checkpoint.pt'} continues it")
    try:
        if RANK == 0:
            out.mkdir(parents=True, exist_ok=True)
            for remnant in out.glob("*.part"):  # of a run that was killed while it saved
                remnant.unlink()
    except OSError as error:
        fail(f"{out}: {error.strerror}")
    print(f"{args.routing} routing on {args.dataset}: {len(fit.labels)} training images, "
          f"{sum(p.numel() for p in net.parameters())} parameters, {args.device}, run in {out}")
    try:
        validation = held_out if args.validate else None
        rows, confusion = train(net, fit, validation, args, checkpoint, out)
    except Stopped:
        print(f"\nsaved; to continue: python train.py --resume {out / 'checkpoint.pt'}")
        sys.exit(130)
    if confusion is None:
        confusion = evaluate(net, held_out, args)
    show(confusion, classes, name)
    settings = settings_of(args)
    result = {f"{name}_error": error_of(confusion), "seconds": rows[-1]["seconds"] if rows else 0,
              "settings": settings, "confusion": confusion.tolist()}
    write_aside(out / "result.json", lambda path: path.write_text(json.dumps(result) + "\n"))
    weights = {"settings": settings, "model": net.state_dict()}
    write_aside(out / "weights.pt", lambda path: torch.save(weights, path))
    print(f"weights in {out / 'weights.pt'}, epochs in {out / 'metrics.csv'}")


if __name__ == "__main__":
    try:
        main()
        if WORLD > 1:
            leave()
    except data.DataError as error:
        fail(error)
    except KeyboardInterrupt:  # before or after the training, which saves itself
        fail("interrupted")
