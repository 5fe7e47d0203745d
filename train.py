"""Train and evaluate the capsule network of capsnet.py: `python train.py --help`.

A run has a folder of its own: checkpoint.pt, saved every ten seconds, which `--resume` continues;
metrics.csv, a line per epoch; and at the end weights.pt, which `--eval` scores, and result.json.

Protocol: settings are chosen with `--validate INSTANCE`, on training toys held out whole (but for
the exceptions in results/README.md). Without it the test set is looked at, once, at the end.

Where training departs from the paper, or chooses what it leaves open:

    * Fewer epochs. Adam's rate is 1.2e-2 (EM: 6e-3, connectionist: 3e-3), rises for ten steps, then
      falls linearly to zero (the paper: 3e-3, exponentially); see `CapsNet.parameter_groups`.
    * The gradient is clipped to a norm of 1. Brightness and contrast vary by 0.2, but not on MNIST
      (the author: 2.0 and 0.5). MNIST is padded to 32x32 and cropped at random to 28x28.
    * The loss, which the paper does not name, is cross-entropy, as in the author's code.
"""

import argparse
import copy
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

# Set before torch is imported: on Linux its waiting threads spin, and two runs at once would stall.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F

import data
from capsnet import ROUTINGS, CapsNet, ConvCaps

EPOCHS = {"toys": 2, "mnist": 4, "smallnorb": 45}
LR = {"similarity": 1.2e-2, "connectionist": 3e-3, "em": 6e-3, "dynamic": 1.2e-2}
WARMUP, CLIP = 10, 1.0  # steps; norm of the gradient
EVAL_BATCH, SHOW_SECONDS = 32, 10  # images; between lines of progress, and between saves
LOCAL = ("device", "compile", "data_dir", "out", "resume", "eval")  # of this call, not of the run


def assignment(text):
    name, _, value = text.partition("=")
    return name, json.loads(value)


def parse(argv=None):
    """-> settings, the checkpoint that they continue or score (or None)."""
    parser = argparse.ArgumentParser(description="Train a capsule network with learned routing.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=data.SPECS, default="toys", help="toys need no download")
    add("--cameras", type=int, choices=(1, 2), default=1, help="2 (smallnorb only): as channels")
    add("--routing", choices=ROUTINGS, default="similarity", help="the routing procedure")
    add("--iterations", type=int, help="if not the routing's own; 0 (similarity only): mean vote")
    add("--option", type=assignment, metavar="NAME=VALUE", nargs="+", action="extend",
        default=[], help="for the routing's constructor, such as lambda1=1 num_kernels=2")
    add("--epochs", type=int, help=f"if not {EPOCHS}")
    add("--batch-size", type=int, default=16, help="images per step")
    add("--lr", type=float, help=f"Adam's highest learning rate, if not {LR}")
    add("--validate", type=int, metavar="INSTANCE",
        help="hold out this training instance of every class, and leave the test set alone")
    add("--crops", type=int, choices=(1, 2, 3), default=1,
        help="score N x N crops; 1 is the central one")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="faster, after a minute or two; uncompiled where compiling fails")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:1")
    add("--data-dir", type=os.path.abspath, default="datasets", help="folder of the data sets")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--out", type=Path, help="new folder for the run; by default one in runs/")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue this run")
    add("--eval", type=Path, metavar="WEIGHTS", help="score these weights again")
    args, checkpoint = parser.parse_args(argv), None
    if path := args.resume or args.eval:
        kind = "checkpoint.pt" if args.resume else "weights.pt"
        try:
            assert args.eval or path.name == kind  # resuming a copy would overwrite the original
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            settings = dict(checkpoint["settings"])
        except Exception as error:  # the unpickler may raise anything on a damaged or foreign file
            raise data.DataError(f"{path}: expected {kind} of a run ({type(error).__name__})")
        args = parser.parse_args(argv, argparse.Namespace(**settings))
        changed = {k for k in settings if vars(args)[k] != settings[k]} - {"epochs", "crops"}
        assert not changed, f"{path}: {changed} cannot change"
    args.epochs = EPOCHS[args.dataset] if args.epochs is None else args.epochs
    args.lr = LR.get(args.routing, 3e-3) if args.lr is None else args.lr
    return args, checkpoint


class OneByOne(ConvCaps):
    """For CPUs: their cache holds the votes of one image, but not those of a batch."""

    def __call__(self, pose, logit):
        call, images = super().__call__, zip(pose.split(1), logit.split(1))
        return [torch.cat(parts) for parts in zip(*(call(*image) for image in images))]


def speed_up(net, images, args):
    """The network, or a compiled copy; `images`: a batch like those that it will see."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do anyway
    if images.is_cpu:
        for layer in [m for m in net.modules() if isinstance(m, ConvCaps)][:-1]:
            layer.__class__ = OneByOne  # not class_caps, which has 2 % of the votes
    if not args.compile or images.device.type not in ("cpu", "cuda"):
        return net
    print("compiling, for a minute or two", flush=True)
    fast = copy.deepcopy(net)
    try:
        if images.is_cuda:
            fast.compile(mode="reduce-overhead")  # as CUDA graphs, or launching takes the time
        for layer in (m for m in fast.modules() if isinstance(m, OneByOne)):
            layer.compile(dynamic=False, isolate_recompiles=True)
        # Compilers start at the first use, and may fail there: use all that will be used.
        with torch.no_grad():
            fast.forward(images)
        if not args.eval:
            fast(images)[1].sum().backward()
    except Exception as error:  # whatever a compiler can do wrong, in thousands of lines
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        print(f"running uncompiled, which is slower: {reason}", flush=True)
        return net
    fast.load_state_dict(net.state_dict())  # batch normalisation's averages have moved
    return fast


@torch.no_grad()
def evaluate(net, dataset, args):
    """-> percent of errors, counts (true class, predicted class); of one crop or several."""
    spec, n = data.SPECS[args.dataset], len(data.SPECS[args.dataset].classes)
    confusion = torch.zeros(n, n, dtype=torch.int64)
    print(f"scoring {len(dataset.labels)} images", flush=True)
    net.eval()
    for images, labels in zip(dataset.images.split(EVAL_BATCH), dataset.labels.split(EVAL_BATCH)):
        crops = data.crops(data.standardise(images), spec.crop, args.crops)
        # net.forward: on a GPU net(crop) would compile the network again, for every batch size.
        logits = torch.stack([net.forward(crop)[1] for crop in crops])
        # The crops' mean probability, in logarithms: near 1, rounding would make ties.
        predicted = logits.log_softmax(2).logsumexp(0).argmax(1)
        confusion += torch.bincount(labels * n + predicted, minlength=n * n).view(n, n).cpu()
    net.train()
    return 100 - 100 * confusion.trace().item() / len(dataset.labels), confusion


def show(name, error, confusion, classes):
    print(f"{name} error {error:.2f} %\nrows: true class, columns: predicted, in the order of "
          f"{', '.join(classes)}\n{confusion}")


def main(argv=None, build=CapsNet):
    """build: CapsNet, or another class that takes the same, such as results/plain_cnn.py's."""
    args, checkpoint = parse(argv)
    spec, device, options = data.SPECS[args.dataset], args.device, dict(args.option)
    if args.iterations is not None:
        options["iterations"] = args.iterations
    shape = args.cameras, spec.crop, spec.crop
    torch.manual_seed(args.seed)
    net = build(shape, len(spec.classes), args.routing, **options).to(device)
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
    splits, name = data.load(args.dataset, args.data_dir, args.cameras), "test"
    if args.validate is not None:
        splits, name = data.hold_out(splits[0], args.validate), "validation"
    fit, held_out = (data.Dataset(*(part.to(device) for part in split)) for split in splits)
    size = min(args.batch_size, len(fit.labels))
    net = speed_up(net, torch.zeros(size, *shape, device=device), args)
    if args.eval:
        return show(name, *evaluate(net, held_out, args), spec.classes)

    optimizer = torch.optim.Adam(net.parameter_groups(args.lr))
    highest = [group["lr"] for group in optimizer.param_groups]
    per_epoch = len(fit.labels) // size  # a last batch that is not full is left out
    steps, step, start = args.epochs * per_epoch, 0, time.perf_counter()
    sums = torch.zeros(2, device=device)  # over the steps of this epoch: loss, percent of errors
    if args.resume:
        out, step = args.resume.parent, checkpoint["step"]
        assert step <= steps, f"{args.resume} has already {step / per_epoch:.4g} epochs"
        optimizer.load_state_dict(checkpoint["optimizer"])
        sums.copy_(checkpoint["sums"])
        start -= checkpoint["seconds"]  # as if the run had never been stopped
    else:
        out = args.out or Path(time.strftime(  # the process: a loop of `train.py &` starts at once
            f"runs/{args.dataset}-{args.routing}-%m%d-%H%M%S-{os.getpid()}"))
        out.mkdir(parents=True)  # fails if the folder is there: it may hold a run
    out, settings = out.resolve(), {k: v for k, v in vars(args).items() if k not in LOCAL}

    again = lambda option, file: shlex.join([  # a command to paste in any folder
        sys.executable, os.path.abspath(sys.argv[0]), "--data-dir", args.data_dir, "--device",
        device, *["--no-compile"][args.compile:], option, str(out / file)])

    def save():
        data.save(out / "checkpoint.pt", dict(
            settings=settings, model=net.state_dict(), optimizer=optimizer.state_dict(), step=step,
            sums=sums, seconds=time.perf_counter() - start))

    save()
    print(f"{type(net).__name__} on {args.dataset}: {len(fit.labels)} training images, "
          f"{sum(p.numel() for p in net.parameters())} parameters, {device}\n"
          f"if it is stopped: {again('--resume', 'checkpoint.pt')}", flush=True)

    for epoch in range(step // per_epoch, args.epochs):
        # Seeded anew, so that a resumed run takes the same steps, on one CPU thread bit for bit.
        torch.manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(fit.labels)).to(device).split(size)[:per_epoch]
        first, began, shown = step, time.perf_counter(), time.perf_counter()
        for batch in order[step % per_epoch:]:
            torch.manual_seed(1_000_003 * args.seed + step)
            images = data.augment(data.standardise(fit.images[batch]), spec)
            labels = fit.labels[batch]
            for group, lr in zip(optimizer.param_groups, highest):  # rises, then straight to zero
                group["lr"] = lr * min(1, (step + 1) / WARMUP) * (1 - step / steps)

            optimizer.zero_grad()  # first: a CUDA graph overwrites the gradients it returned
            logits = net(images)[1]
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP, error_if_nonfinite=True)
            optimizer.step()
            step += 1
            errors = 100 * (logits.argmax(1) != labels).float().mean()
            sums += torch.stack([loss.detach(), errors])

            now, ends = time.perf_counter(), step % per_epoch == 0
            if ends or now > shown + SHOW_SECONDS:
                shown, rate = now, (step - first) / (now - began)
                mean_loss, error = (sums / (step - epoch * per_epoch)).tolist()
                print(f"epoch {epoch + 1}/{args.epochs}  {rate * size:.0f} images/s  "
                      f"loss {mean_loss:.4f}  training error {error:.2f} %  "
                      f"{(steps - step) / rate / 60:.0f} min left", flush=True)
                if not ends:
                    save()

        row = dict(epoch=epoch + 1, step=step, loss=mean_loss, training_error=error)
        if args.validate is not None:
            row["validation_error"], _ = evaluate(net, held_out, args)
            print(f"validation error {row['validation_error']:.2f} %", flush=True)
        row["seconds"] = round(time.perf_counter() - start, 1)
        sums.zero_()
        save()  # before the row: a full disk may then cost the row, but never write it twice
        with open(out / "metrics.csv", "a") as file:
            for line in [row.keys(), row.values()][file.tell() > 0:]:
                print(*line, sep=",", file=file)

    seconds = round(time.perf_counter() - start, 1)
    error, confusion = evaluate(net, held_out, args)
    show(name, error, confusion, spec.classes)
    result = {f"{name}_error": error, "seconds": seconds, "settings": settings,
              "confusion": confusion.tolist()}
    (out / "result.json").write_text(json.dumps(result) + "\n")
    # From the CPU, so that torch.load opens them on a machine without this device.
    data.save(out / "weights.pt", {"settings": settings, "model": net.cpu().state_dict()})
    print(f"all files in {out}; to score again: {again('--eval', 'weights.pt')}")


def command_line(build=CapsNet):
    """main, for a terminal: errors of files or of the machine are shown in one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main(build=build)
    except (data.DataError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"train.py: {str(error) or 'interrupted'}")


if __name__ == "__main__":
    command_line()
