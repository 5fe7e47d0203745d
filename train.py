"""Train and evaluate the capsule network of capsnet.py: `python train.py --help`.

A run has a folder of its own: checkpoint.pt, saved every ten seconds, which `--resume` continues;
metrics.csv, a line per epoch; and in the end weights.pt, which `--eval` scores, and result.json.

Protocol: settings are chosen with `--validate INSTANCE`, on training toys held out whole; the
exceptions are in results/README.md (the number of epochs, and what the demo's toys look like).
Without it all training images are used, and the test set is looked at once, at the end.
"""

import argparse
import json
import shlex
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
LR = {"similarity": 1.2e-2, "connectionist": 3e-3, "em": 6e-3, "dynamic": 1.2e-2}
WARMUP, CLIP = 10, 1.0  # steps; norm of the gradient
EVAL_BATCH, SHOW_SECONDS = 32, 10  # images; between two lines of progress, and two saves
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
    add("--cameras", type=int, choices=(1, 2), default=1,
        help="2 of smallnorb only: as channels" + default)
    add("--routing", choices=ROUTINGS, default="similarity", help="the routing procedure" + default)
    add("--iterations", type=int, help="if not the routing's own; 0 is the mean vote")
    add("--option", type=assignment, metavar="NAME=VALUE", action="append", default=[],
        help="for the routing's constructor, such as lambda1=1; may be repeated")
    add("--epochs", type=int, help=f"if not {EPOCHS}")
    add("--batch-size", type=int, default=16, help="images per step" + default)
    add("--lr", type=float, help=f"Adam's highest learning rate, if not {LR}")
    add("--validate", type=int, metavar="INSTANCE",
        help="hold out this training instance of every class, and leave the test set alone")
    add("--crops", type=int, default=1, help="score N x N crops, 1: the central one" + default)
    add("--seed", type=int, default=0, help="of weights, order and augmentation" + default)
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="faster, after a minute; goes without where it cannot" + default)
    add("--device", help="to run on" + default,
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data-dir", default="datasets", help="where the data sets are, or will be put" + default)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--out", type=Path, help="folder for the run, if not a new one in runs/")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue this run; --epochs, "
        "--device, --compile, --data-dir may be given again")
    add("--eval", type=Path, metavar="WEIGHTS", help="score these weights again")
    args, checkpoint = parser.parse_args(argv), None
    if args.resume or args.eval:
        checkpoint = load_checkpoint(args)
        run = checkpoint["settings"]
        saved = run | (checkpoint["local"] if args.resume else {})
        args = parser.parse_args(argv, argparse.Namespace(**saved | {"option": []}))
        args.option = args.option or saved["option"]  # argparse would append to the saved ones
        for name in run if args.resume else ():
            if vars(args)[name] != run[name] and name != "epochs":
                fail(f"--{name.replace('_', '-')} {vars(args)[name]}: {args.resume} was started "
                     f"with {run[name]}")
    args.epochs = EPOCHS[args.dataset] if args.epochs is None else args.epochs
    args.lr = LR.get(args.routing, 3e-3) if args.lr is None else args.lr
    for name, low in dict(batch_size=1, crops=1, epochs=0, lr=0).items():
        if not low <= vars(args)[name] < float("inf"):  # nan included
            fail(f"--{name.replace('_', '-')} {vars(args)[name]}: expected {low} or more")
    return args, checkpoint


def load_checkpoint(args):
    path, kind = args.resume or args.eval, "checkpoint.pt" if args.resume else "weights.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        data.SPECS[checkpoint["settings"]["dataset"]], checkpoint["model"]  # a KeyError, if absent
        checkpoint["local" if args.resume else "model"]  # weights have the settings, but not these
        return checkpoint
    except Exception as error:  # the unpickler may raise anything on a damaged or foreign file
        fail(f"{path}: expected {kind} of a run of this program ({type(error).__name__})")


# ------------------------------------------------------------------- the network and its errors


def make(args, checkpoint, build):
    """The network on its device: of the seed, or as in the checkpoint."""
    spec, options = data.SPECS[args.dataset], dict(args.option)
    if args.iterations is not None:
        options["iterations"] = args.iterations
    shape = args.cameras, spec.crop, spec.crop
    try:
        torch.manual_seed(args.seed)
        net = build(shape, len(spec.classes), args.routing, **options)
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape))  # some options are wrong only there
        if checkpoint:
            net.load_state_dict(checkpoint["model"])
        return net.train().to(args.device)
    except Exception as error:  # whatever a constructor, a state_dict or a device may object to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fail(f"{args.resume or args.eval or 'no such network'}: {reason} (--dataset {args.dataset} "
             f"--routing {args.routing} --iterations {args.iterations} --option {args.option} "
             f"--device {args.device})")


def one_by_one(run):
    """run, a ConvCaps' forward, for a batch: one image after another."""
    return lambda pose, logit: [torch.cat(parts) for parts in
                                zip(*map(run, pose.split(1), logit.split(1)))]


def speed_up(net, args):
    """Compile; args.compile says afterwards whether that worked. On a CPU, where the votes of one
    image stay in the cache and those of a batch do not, take one image after another."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do anyway
    try:
        if args.compile:
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=args.device))
    except Exception as error:  # whatever a compiler can do wrong: PyTorch would print thousands
        args.compile = False
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        print(f"running uncompiled, which is slower: {reason}", flush=True)
    if torch.device(args.device).type == "cuda" and args.compile:
        net.compile(mode="reduce-overhead")  # as CUDA graphs, or launching takes the time
    elif torch.device(args.device).type == "cpu":
        for layer in [m for m in net.modules() if isinstance(m, ConvCaps)][:-1]:
            run = torch.compile(layer.forward, dynamic=False) if args.compile else layer.forward
            layer.forward = one_by_one(run)  # not of class_caps, which has 2 % of the votes


@torch.no_grad()
def evaluate(net, dataset, args):
    """-> percent of errors, counts (true class, predicted class); of one crop or several."""
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
    confusion = confusion.view(n, n).cpu()
    return 100 - 100 * confusion.trace().item() / len(dataset.labels), confusion


def show(name, error, confusion, classes):
    total, right = confusion.sum().item(), confusion.trace().item()
    print(f"{name} error {error:.2f} %: {total - right} of {total} images")
    width = max(map(len, (*classes, str(confusion.max().item())))) + 2
    for label, row in zip(("true, predicted", *classes), (classes, *confusion.tolist())):
        print(label.ljust(16) + "".join(str(cell).rjust(width) for cell in row))


# -------------------------------------------------------------------------------- the whole run


def main(argv=None, build=CapsNet):
    """build: the network's class; of another one than CapsNet, see results/plain_cnn.py."""
    args, checkpoint = parse(argv)
    spec, device, size = data.SPECS[args.dataset], args.device, args.batch_size
    net = make(args, checkpoint, build)  # first: what is wrong shows before a download
    splits = data.load(args.dataset, args.data_dir, args.cameras)
    if args.validate is not None:
        splits = data.hold_out(splits[0], args.validate)
    name = "test" if args.validate is None else "validation"
    fit, held_out = (data.Dataset(*(part.to(device) for part in split)) for split in splits)
    speed_up(net, args)
    if args.eval:
        return show(name, *evaluate(net, held_out, args), spec.classes)

    optimizer = torch.optim.Adam(net.parameter_groups(args.lr))
    highest = [group["lr"] for group in optimizer.param_groups]
    step, rows, seconds = 0, [], 0.0
    sums = torch.zeros(2, device=device)  # over the steps of this epoch: loss, percent of errors
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

    settings, local = dict(vars(args)), {key: vars(args)[key] for key in LOCAL}
    for key in (*LOCAL, "out", "resume", "eval"):
        del settings[key]
    program = f"python {shlex.quote(sys.argv[0])}"  # to be pasted, as the paths below

    def save():
        """All that a resumed run needs to repeat the uninterrupted one, on one CPU thread bit for
        bit."""
        data.write(out / "checkpoint.pt", dict(
            settings=settings, local=local, model=net.state_dict(), step=step, sums=sums, rows=rows,
            optimizer=optimizer.state_dict(), seconds=time.monotonic() - start))

    save()  # a folder that cannot be written shows now
    print(f"{type(net).__name__} on {args.dataset}: {len(fit.labels)} training images, "
          f"{sum(p.numel() for p in net.parameters())} parameters, {device}"
          f"{', compiling first, for up to a minute' * args.compile}"
          f"\nif it is stopped: {program} --resume {shlex.quote(str(out / 'checkpoint.pt'))}",
          flush=True)

    shown = None  # when and at which step the last line was
    while step < steps:
        epoch, place = divmod(step, per_epoch)
        # Seeds from epoch and step: no random state has to be saved.
        torch.manual_seed(1000 * args.seed + epoch)  # the order of the epoch
        batch = torch.randperm(len(fit.labels))[place * size:(place + 1) * size].to(device)
        torch.manual_seed(1_000_003 * args.seed + step)  # the augmentation of the step
        images = data.augment(data.standardise(fit.images[batch]), spec)
        labels = fit.labels[batch]
        for group, lr in zip(optimizer.param_groups, highest):  # rises, then straight to zero
            group["lr"] = lr * min(1, (step + 1) / WARMUP) * (1 - step / steps)

        optimizer.zero_grad()  # first: a CUDA graph overwrites the gradients it returned
        logits = net(images)[1]
        loss = F.cross_entropy(logits, labels)
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
        if not done:
            taken, done = now - start, step
        print(f"epoch {epoch + 1}/{args.epochs}  {done * size / taken:.0f} images/s  loss "
              f"{mean_loss:.4f}  training error {error:.2f} %  "
              f"{taken / done * (steps - step) / 60:.0f} min left", flush=True)
        if ends:
            row = dict(epoch=epoch + 1, step=step, loss=mean_loss, training_error=error)
            if args.validate is not None:
                row["validation_error"], _ = evaluate(net, held_out, args)
                print(f"validation error {row['validation_error']:.2f} %", flush=True)
            rows.append({**row, "seconds": round(time.monotonic() - start, 1)})
            sums.zero_()
            # Before the checkpoint: a run that is killed between the two writes it again.
            lines = [rows[0].keys(), *(row.values() for row in rows)]
            data.write(out / "metrics.csv", "".join(",".join(map(str, x)) + "\n" for x in lines))
        save()
        shown = time.monotonic(), step

    error, confusion = evaluate(net, held_out, args)
    show(name, error, confusion, spec.classes)
    result = {f"{name}_error": error, "seconds": rows[-1]["seconds"] if rows else 0,
              "settings": settings, "confusion": confusion.tolist()}
    data.write(out / "result.json", json.dumps(result) + "\n")
    # From the CPU, so that torch.load opens them on a machine without this device.
    data.write(out / "weights.pt", {"settings": settings, "model": net.cpu().state_dict()})
    print(f"all files in {out}; to score again: {program} --eval "
          f"{shlex.quote(str(out / 'weights.pt'))} --data-dir {shlex.quote(args.data_dir)}")


def command_line(build=CapsNet):
    """main, for a terminal: what a user or the machine did is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.stdout.reconfigure(errors="replace")  # paths may have letters that it cannot show
    try:
        main(build=build)
    except (data.DataError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted")


if __name__ == "__main__":
    command_line()
