"""Train and evaluate the capsule network of capsnet.py: `python train.py --help`.

A run has a folder of its own: checkpoint.pt, saved every ten seconds, which `--resume` continues;
metrics.csv, a line per epoch; and in the end weights.pt, which `--eval` scores, and result.json.

Protocol: settings are chosen with `--validate INSTANCE`, on training toys held out whole; the
exceptions are in results/README.md (the number of epochs, and what the demo's toys look like).
Without it all training images are used, and the test set is looked at once, at the end.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from capsnet import ROUTINGS, CapsNet, ConvCaps

EPOCHS = {"toys": 2, "mnist": 4, "smallnorb": 45}
WARMUP, CLIP = 10, 1.0  # steps; norm of the gradient
EVAL_BATCH, SHOW_SECONDS = 32, 10  # progress is shown, and saved, as often
LOCAL = ("data_dir", "device", "compile")  # settings of the machine, not of the run


def fail(message):
    """A user's mistake, or the machine's: one line, no traceback."""
    sys.exit(f"train.py: {message}")


# ---------------------------------------------------------------------- options and checkpoints


def assignment(text):
    name, _, value = text.partition("=")
    return name, json.loads(value)


def parse(argv=None):
    """-> (settings, the checkpoint that they continue or score, or None)."""
    parser = argparse.ArgumentParser(description="Train a capsule network with learned routing.",
                                     allow_abbrev=False)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--dataset", choices=data.SPECS, default="toys", help="toys need no download" + default)
    add("--cameras", type=int, default=1, help="1 or, of smallnorb, 2: as channels" + default)
    add("--routing", choices=ROUTINGS, default="similarity", help="the routing procedure" + default)
    add("--iterations", type=int, help="if not the routing's own; 0 is the mean vote")
    add("--option", type=assignment, metavar="NAME=VALUE", action="append", default=[],
        help="for the routing's constructor, such as lambda1=1; may be repeated")
    add("--epochs", type=int, help=f"if not {EPOCHS}")
    add("--batch-size", type=int, default=16, help="images per step" + default)
    add("--lr", type=float, help="Adam's highest learning rate, if not the routing's own")
    add("--mixup", type=float, default=0.0, metavar="ALPHA",
        help="blend training images in shares of Beta(ALPHA, ALPHA), 0: not" + default)
    add("--validate", type=int, metavar="INSTANCE",
        help="hold out this training instance of every class, and leave the test set alone")
    add("--crops", type=int, default=1, help="score N x N crops, 1: the central one" + default)
    add("--seed", type=int, default=0, help="of weights, order and augmentation" + default)
    add("--compile", action=argparse.BooleanOptionalAction, help="faster, after a minute" + default,
        default=bool(shutil.which(os.environ.get("CXX", "g++"))))
    add("--device", help="to run on" + default,
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data-dir", default="datasets", help="where the data sets are, or will be put" + default)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--out", type=Path, help="folder for the run, if not a new one in runs/")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue this run with its settings; of "
        "the run --epochs, --lr and --crops, of the machine all may be given again")
    add("--eval", type=Path, metavar="WEIGHTS", help="score these weights")
    args, checkpoint = parser.parse_args(argv), None
    if args.resume or args.eval:
        checkpoint = load_checkpoint(args)
        more = checkpoint["local"] if args.resume else {"validate": None}
        saved = checkpoint["settings"] | more
        args = parser.parse_args(argv, argparse.Namespace(**saved))  # these are the defaults now
        for name in saved.keys() - {"epochs", "lr", "crops", *LOCAL} if args.resume else ():
            if vars(args)[name] != saved[name]:
                fail(f"--{name.replace('_', '-')} {vars(args)[name]}: {args.resume} was started "
                     f"with {saved[name]}")
    args.epochs = EPOCHS[args.dataset] if args.epochs is None else args.epochs
    args.lr = ROUTINGS[args.routing][0].lr if args.lr is None else args.lr
    for name, low in (("batch_size", 1), ("crops", 1), ("epochs", 0), ("lr", 0), ("mixup", 0)):
        if not vars(args)[name] >= low:  # nan included
            fail(f"--{name.replace('_', '-')} {vars(args)[name]}: expected {low} or more")
    return args, checkpoint


def load_checkpoint(args):
    path, kind = args.resume or args.eval, "checkpoint.pt" if args.resume else "weights.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        data.SPECS[checkpoint["settings"]["dataset"]], checkpoint["model"]
        if args.resume:
            [checkpoint[name] for name in ("local", "step", "rows", "seconds", "sums", "optimizer")]
        return checkpoint
    except Exception as error:  # the unpickler may raise anything on a damaged or foreign file
        fail(f"{path}: expected {kind} of a run of this program ({type(error).__name__})")


def settings_of(args):
    """Of the run: what its weights carry with them."""
    return {name: value for name, value in vars(args).items()
            if name not in (*LOCAL, "out", "resume", "eval")}


def command(*arguments):
    """What to type, quoted."""
    return shlex.join(["python", sys.argv[0], *map(str, arguments)])


# ------------------------------------------------------------------------- model and evaluation


def make(args, checkpoint, build):
    """The network on its device: of the seed, or as in the checkpoint."""
    spec = data.SPECS[args.dataset]
    options = {} if args.iterations is None else {"iterations": args.iterations}
    torch.manual_seed(args.seed % 2**64)
    try:
        net = build((args.cameras, spec.crop, spec.crop), len(spec.classes), args.routing,
                    **options, **dict(args.option))
        if checkpoint:
            net.load_state_dict(checkpoint["model"])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{args.resume or args.eval or 'no such network'}: not for --dataset {args.dataset} "
             f"--routing {args.routing} --iterations {args.iterations} --option {args.option} "
             f"({' '.join(str(error).split())[:200]})")
    return net.to(args.device)


def compiler_works(device):
    """Try it; if it does not, say so in one line, where PyTorch would print thousands."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # whatever a compiler can do wrong
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        print(f"running uncompiled, which is slower: {reason}", flush=True)
        return False


def one_by_one(run):
    """run, a ConvCaps' forward, for a batch: one image after another."""
    def on_batch(pose, logit):
        outputs = [run(*image) for image in zip(pose.split(1), logit.split(1))]
        return [torch.cat(parts) for parts in zip(*outputs)]
    return on_batch


def speed_up(net, args):
    """Compile; and on a CPU, where the votes of one image stay in the cache and those of a batch do
    not, take one image after another."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do anyway
    args.compile = args.compile and compiler_works(args.device)
    if torch.device(args.device).type == "cuda" and args.compile:
        net.compile(mode="reduce-overhead")  # as CUDA graphs, or launching takes the time
    elif torch.device(args.device).type == "cpu":
        for layer in [m for m in net.modules() if isinstance(m, ConvCaps)][:-1]:
            run = torch.compile(layer.forward, dynamic=False) if args.compile else layer.forward
            layer.forward = one_by_one(run)  # not of class_caps, which has 2 % of the votes


@torch.no_grad()
def evaluate(net, dataset, args):
    """-> confusion counts (true class, predicted class), on the central crop or several."""
    spec = data.SPECS[args.dataset]
    n = len(spec.classes)
    confusion = torch.zeros(n * n, dtype=torch.int64, device=args.device)
    net.eval()
    for images, labels in zip(dataset.images.split(EVAL_BATCH), dataset.labels.split(EVAL_BATCH)):
        crops = data.crops(data.standardise(images), spec.crop, args.crops)
        # net.forward: on a GPU net(crop) would compile the network again, for every batch size.
        logits = torch.stack([net.forward(crop)[1] for crop in crops])
        # The mean of the crops' probabilities, as a logarithm: rounding makes no ties there.
        predicted = logits.log_softmax(2).logsumexp(0).argmax(1)
        confusion += torch.bincount(labels * n + predicted, minlength=n * n)
    net.train()
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


# -------------------------------------------------------------------------------- the whole run


def main(argv=None, build=CapsNet):
    """build: the network's class; of another one than CapsNet, see results/plain_cnn.py."""
    args, checkpoint = parse(argv)
    spec, device, size = data.SPECS[args.dataset], args.device, args.batch_size
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"--device {device}: {str(error).splitlines()[0]}")
    splits, name = data.load(args.dataset, args.data_dir, args.cameras), "test"
    if args.validate is not None:
        splits, name = data.hold_out(splits[0], args.validate), "validation"
    fit, held_out = (data.Dataset(*(part.to(device) for part in split)) for split in splits)
    net = make(args, checkpoint, build)
    speed_up(net, args)
    if args.eval:
        return show(evaluate(net, held_out, args), spec.classes, name)

    optimizer = torch.optim.Adam(net.parameter_groups(args.lr))
    top = [group["lr"] for group in optimizer.param_groups]
    step, rows, seconds, sums = 0, [], 0.0, torch.zeros(2, device=device)  # of the epoch, see below
    if args.resume:
        out = args.resume.parent
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, rows, seconds = (checkpoint[key] for key in ("step", "rows", "seconds"))
        sums.copy_(checkpoint["sums"])
    else:
        new = (Path(f"runs/{args.dataset}-{args.routing}-{n}") for n in count(1))
        out = args.out or next(folder for folder in new if not folder.exists())
        if any((out / file).exists() for file in ("checkpoint.pt", "weights.pt")):
            fail(f"--out {out}: holds a run already; --resume continues its checkpoint.pt")
    per_epoch = max(1, len(fit.labels) // size)  # a last batch that is not full is left out
    steps = args.epochs * per_epoch
    if step > steps:
        fail(f"--epochs {args.epochs}: {args.resume} has {step / per_epoch:.4g} behind it")
    start = time.monotonic() - seconds  # of the run, as if it had never been stopped

    def save():
        """All that the next step depends on: on one CPU thread a resumed run repeats the
        uninterrupted one bit for bit."""
        state = dict(settings=settings_of(args), local={name: vars(args)[name] for name in LOCAL},
                     model=net.state_dict(), optimizer=optimizer.state_dict(), step=step,
                     sums=sums, rows=rows, seconds=time.monotonic() - start)
        with data.written_aside(out / "checkpoint.pt") as aside:
            torch.save(state, aside)

    save()  # a folder that cannot be written shows now
    print(f"{args.routing} routing on {args.dataset}: {len(fit.labels)} training images, "
          f"{sum(p.numel() for p in net.parameters())} parameters, {device}"
          + ", compiling first, for up to a minute" * args.compile
          + "\nif it is stopped: " + command("--resume", out / "checkpoint.pt"), flush=True)

    order, shown = None, None  # of the epoch; when and at which step the last line was
    while step < steps:
        epoch, place = divmod(step, per_epoch)
        if order is None or place == 0:
            torch.manual_seed((1000 * args.seed + epoch) % 2**32)
            order = torch.randperm(len(fit.labels)).to(device)
        batch = order[place * size:(place + 1) * size]
        torch.manual_seed((1_000_003 * args.seed + step) % 2**32)  # a CPU uses no more bits
        images = data.augment(data.standardise(fit.images[batch]), spec)
        targets = labels = fit.labels[batch]
        if args.mixup:
            images, targets = data.mixup(images, labels, len(spec.classes), args.mixup)
        for group, lr in zip(optimizer.param_groups, top):  # a short rise, then straight to zero
            group["lr"] = lr * min(1, (step + 1) / WARMUP) * (1 - step / steps)

        optimizer.zero_grad()  # first: a CUDA graph overwrites the gradients it returned
        logits = net(images)[1]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        if not nn.utils.clip_grad_norm_(net.parameters(), CLIP).isfinite():
            fail(f"step {step + 1}: the loss is {loss.item()}, its gradient not finite; what is "
                 f"saved in {out / 'checkpoint.pt'} is from before")
        optimizer.step()
        step += 1
        sums += torch.stack([loss.detach(), 100 * (logits.argmax(1) != labels).float().mean()])

        now, ends = time.monotonic(), step % per_epoch == 0
        shown = shown or (now, step)  # not the first step, which may compile
        if not ends and now - shown[0] < SHOW_SECONDS:
            continue
        mean_loss, error = (sums / (place + 1)).tolist()
        taken, done = now - shown[0], step - shown[1]  # since the last line
        print(f"epoch {epoch + 1}/{args.epochs}  {done * size / max(taken, 1e-9):.0f} images/s  "
              f"loss {mean_loss:.4f}  training error {error:.2f} %  "
              f"{taken / max(done, 1) * (steps - step) / 60:.0f} min left", flush=True)
        if ends:
            row = dict(epoch=epoch + 1, step=step, loss=mean_loss, training_error=error)
            if args.validate is not None:
                row["validation_error"] = error_of(evaluate(net, held_out, args))
                print(f"validation error {row['validation_error']:.2f} %", flush=True)
            rows.append({**row, "seconds": round(time.monotonic() - start, 1)})
            sums.zero_()
            # Before the checkpoint: a run that is killed between the two repeats this step.
            lines = [",".join(map(str, cells)) for cells in (rows[0], *(r.values() for r in rows))]
            with data.written_aside(out / "metrics.csv") as aside:
                aside.write_text("\n".join(lines) + "\n")
        save()
        shown = time.monotonic(), step

    show(confusion := evaluate(net, held_out, args), spec.classes, name)
    result = {f"{name}_error": error_of(confusion), "seconds": rows[-1]["seconds"] if rows else 0,
              "settings": settings_of(args), "confusion": confusion.tolist()}
    with data.written_aside(out / "result.json") as aside:
        aside.write_text(json.dumps(result) + "\n")
    # From the CPU, so that torch.load opens them on a machine without this device.
    weights = {"settings": settings_of(args), "model": net.cpu().state_dict()}
    with data.written_aside(out / "weights.pt") as aside:
        torch.save(weights, aside)
    again = command("--eval", out / "weights.pt", "--data-dir", args.data_dir)
    print(f"all files in {out}; to score again: {again}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # paths may have letters that it cannot show
    try:
        main()
    except (data.DataError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted")
