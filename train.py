"""Train and evaluate the capsule network of capsnet.py: `python train.py --help`.

A run lives in a folder of its own: metrics.csv, a line per epoch, and checkpoint.pt, which
`--resume` continues and `--eval` scores. The protocol: whatever is chosen, is chosen with
`--validate`, on held-out training instances; without it all training data is used, and the test
set is looked at once, at the end.
"""

import argparse
import csv
import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from capsnet import ROUTINGS, CapsNet, spread_loss

# Options that say where and how to run, not what is trained: a checkpoint does not impose them.
LOCAL = ("resume", "eval", "device", "data_dir", "out")
EPOCHS = {"toys": 1, "mnist": 10, "smallnorb": 100}


def fail(message):
    """A user's mistake: one line, no traceback."""
    sys.exit(f"train.py: {message}")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Train a capsule network with learned routing.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--dataset", choices=data.SPECS, default="toys", help="toys are rendered, others downloaded")
    add("--routing", choices=ROUTINGS, default="similarity", help="the routing procedure")
    add("--iterations", type=int, default=3, help="of routing")
    add("--epochs", type=int, help=f"passes over the training images [by data set: {EPOCHS}]")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--lr", type=float, default=3e-3, help="Adam's learning rate after the warm-up")
    add("--lr-decay", type=float, default=0.01, help="the last learning rate, as a part of --lr")
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--loss", choices=("cross-entropy", "spread"), default="cross-entropy", help="of the logits")
    add("--routing-option", metavar="NAME=NUMBER", action="append", default=[],
        help="passed to the routing, such as lambda1=3 or mean_shift=1; may be repeated")
    add("--cameras", type=int, default=1, help="views of a scene as channels: 1, or 2 for smallnorb")
    add("--limit", type=int, help="use only so many training images, drawn at random")
    add("--validate", action="store_true", help="hold out training instances; never touch the test set")
    add("--seed", type=int, default=0, help="of weights, data order and augmentation")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile the routing: faster, a minute to start")
    add("--max-votes", type=int, help="vote entries in memory at a time [CPU: 2e6, else all]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")
    add("--data-dir", default="datasets", help="where the data sets are, or will be put")
    add("--out", help="folder of the run [a new one in runs/]")
    add("--resume", metavar="CHECKPOINT", help="continue this run, with its settings")
    add("--eval", metavar="CHECKPOINT", help="test error and confusion matrix of these weights")
    args = p.parse_args(argv)
    checkpoint = None
    if path := args.resume or args.eval:
        checkpoint = load_checkpoint(path)
        p.set_defaults(**checkpoint["settings"])
        args = p.parse_args(argv)
    args.epochs = args.epochs if args.epochs is not None else EPOCHS[args.dataset]
    for name in ("epochs", "batch_size", "iterations"):
        if getattr(args, name) < (name == "batch_size"):
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a positive number")
    return args, checkpoint


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {"settings": dict(checkpoint["settings"]), **checkpoint}
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        fail(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0][:80]})")


def write_aside(path, write):
    """Write a temporary file, then rename: whatever happens, `path` is whole."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    except OSError as error:
        fail(f"{path} could not be written ({error}); the one before it is whole")
    finally:
        aside.unlink(missing_ok=True)


def build(args):
    spec = data.SPECS[args.dataset]
    options = {} if args.routing == "mean" else {"iterations": args.iterations}
    for text in args.routing_option:
        name, _, value = text.partition("=")
        try:
            options[name] = float(value)
        except ValueError:
            fail(f"--routing-option {text}: expected NAME=NUMBER")
    torch.manual_seed(args.seed)
    max_votes = args.max_votes or (2_000_000 if args.device == "cpu" else None)
    try:
        net = CapsNet((args.cameras, spec.crop, spec.crop), len(spec.classes), args.routing,
                      max_votes=max_votes, **options)
    except TypeError as error:
        fail(f"--routing-option: {args.routing} routing does not take it ({error})")
    net.to(args.device)
    if args.compile:  # per layer, on contiguous receptive fields: the part that fusing speeds up
        for layer in net.caps:
            layer.route = torch.compile(layer.route)
    return net


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


@torch.inference_mode()
def evaluate(net, dataset, args):
    """-> confusion matrix (true, predicted), int64."""
    spec, classes = data.SPECS[args.dataset], len(data.SPECS[args.dataset].classes)
    net.eval()
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=args.device)
    for images, labels in zip(dataset.images.split(256), dataset.labels.split(256)):
        with autocast(args):
            _, logits = net(data.central_crop(data.standardise(images), spec.crop))
        confusion += torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    return confusion.view(classes, classes).cpu()


def error_of(confusion):
    return 100 * (1 - confusion.trace().item() / confusion.sum().item())


def report(confusion, classes, what):
    wrong = int(confusion.sum() - confusion.trace())
    print(f"{what} error {error_of(confusion):.2f} % ({wrong} of {confusion.sum()} images)")
    width = max(6, *map(len, classes)) + 1
    print("true \\ predicted".rjust(16) + "".join(c.rjust(width) for c in classes))
    for name, row in zip(classes, confusion.tolist()):
        print(name.rjust(16) + "".join(str(n).rjust(width) for n in row))


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class Stop(Exception):
    """SIGINT or SIGTERM arrived; raised between two steps."""


def train(net, fit, held_out, args, checkpoint, out):
    """Train to the end of the last epoch, saving as it goes. Raises Stop when told to stop."""
    spec, device = data.SPECS[args.dataset], torch.device(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    steps_per_epoch = max(1, len(fit.images) // args.batch_size)
    total = args.epochs * steps_per_epoch
    noise = torch.Generator(device).manual_seed(args.seed)  # of the augmentation
    step, rows, tally, spent = 0, [], torch.zeros(3, device=device), 0.0
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        noise.set_state(checkpoint["noise"])
        step, rows, spent = checkpoint["step"], checkpoint["rows"], checkpoint["seconds"]
        tally = checkpoint["tally"].to(device)
    settings = {k: v for k, v in vars(args).items() if k not in LOCAL}

    def save():
        state = dict(settings=settings, model=net.state_dict(), optimizer=optimizer.state_dict(),
                     noise=noise.get_state(), step=step, rows=rows, tally=tally, seconds=spent)
        write_aside(out / "checkpoint.pt", lambda path: torch.save(state, path))

    def progress(end):
        loss, wrong, seen = tally.tolist()
        if seen and not loss == loss:
            fail(f"the loss is not a number by step {step}; {out / 'checkpoint.pt'} is the last good one")
        rate = (step - first) * args.batch_size / max(time.time() - started, 1e-9)
        left = (total - step) * args.batch_size / max(rate, 1e-9)
        part = f"{100 * (step - epoch * steps_per_epoch) / steps_per_epoch:3.0f} %"
        print(f"\repoch {epoch + 1}/{args.epochs} {part}  {rate:.0f} images/s  loss {loss / seen:.4f}  "
              f"training error {100 * wrong / seen:.2f} %  left {clock(left)}  ", end=end, flush=True)

    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
    first, started, shown = step, time.time(), time.time()
    base, saved = spent, time.time()
    try:
        while step < total:
            epoch, position = divmod(step, steps_per_epoch)
            order = torch.randperm(len(fit.images), generator=torch.Generator().manual_seed(args.seed + epoch))
            net.train()
            for batch in order.to(device)[position * args.batch_size:].split(args.batch_size)[:steps_per_epoch - position]:
                for group in optimizer.param_groups:
                    group["lr"] = (args.lr * min(1, (step + 1) / max(1, args.warmup))
                                   * args.lr_decay ** (step / total))
                images = data.augment(data.standardise(fit.images[batch]), spec.crop,
                                      spec.brightness, spec.contrast, noise)
                labels = fit.labels[batch]
                with autocast(args):
                    _, logits = net(images)
                logits = logits.float()
                if args.loss == "spread":
                    loss = spread_loss(logits, labels, 0.2 + 0.7 * min(1, 2 * step / total))
                else:
                    loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                optimizer.step()
                step += 1
                wrong = (logits.detach().argmax(1) != labels).sum()
                tally += torch.stack([loss.detach() * len(batch), wrong, torch.tensor(len(batch), device=device)])
                spent = base + time.time() - started
                if time.time() - shown > (1 if sys.stdout.isatty() else 30):
                    progress("" if sys.stdout.isatty() else "\n")
                    shown = time.time()
                if stop:
                    save()
                    raise Stop
                if time.time() - saved > 120:
                    save()
                    saved = time.time()
            progress("\n")
            loss, wrong, seen = tally.tolist()
            row = dict(epoch=epoch + 1, step=step, loss=loss / seen, training_error=100 * wrong / seen)
            if held_out:
                row["validation_error"] = error_of(evaluate(net, held_out, args))
                print(f"validation error {row['validation_error']:.2f} %", flush=True)
            rows.append(row | dict(seconds=round(spent, 1)))
            tally.zero_()
            save()
            write_aside(out / "metrics.csv", lambda path: write_csv(path, rows))
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(argv=None):
    args, checkpoint = parse(argv)
    sets = data.load(args.dataset, args.data_dir, args.cameras)
    classes = data.SPECS[args.dataset].classes
    fit, test = sets
    held_out = None
    if args.validate:
        fit, held_out = data.split_validation(args.dataset, fit)
    if args.limit:
        keep = torch.randperm(len(fit.images), generator=torch.Generator().manual_seed(args.seed))[:args.limit]
        fit = data.Dataset(*(t[keep] for t in fit))
    fit, test, held_out = (s and data.Dataset(*(t.to(args.device) for t in s)) for s in (fit, test, held_out))
    net = build(args)
    if args.eval:
        net.load_state_dict(checkpoint["model"])
        return report(evaluate(net, held_out or test, args), classes, "validation" if held_out else "test")
    if args.resume:
        out = Path(args.resume).parent
    elif args.out:
        out = Path(args.out)
    else:
        names = (Path("runs") / f"{args.dataset}-{args.routing}-{n}" for n in count(1))
        out = next(path for path in names if not path.exists())
    out.mkdir(parents=True, exist_ok=True)
    print(f"{args.routing} routing on {args.dataset}: {len(fit.images)} training images, "
          f"{sum(p.numel() for p in net.parameters())} parameters, {args.device}; run in {out}")
    try:
        train(net, fit, held_out, args, checkpoint, out)
    except Stop:
        print(f"\nstopped; to continue:\n  python train.py --resume {out / 'checkpoint.pt'}")
        sys.exit(130)
    report(evaluate(net, held_out or test, args), classes, "validation" if held_out else "test")


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        fail(error)
