"""The data: toys (rendered here, the default), MNIST and smallNORB, their cache and augmentation.

`load` gives a training and a test `Dataset`; `split_validation` takes the validation part out of
the first. Images stay uint8 until `standardise`; `augment` and `crops` then cut the window
that the network sees. The reader of the official files, the downloader, the cache and the
renderer of the toys are the rest of this file.

smallNORB: LeCun, Huang and Bottou, "Learning methods for generic object recognition with
invariance to pose and lighting", CVPR 2004; for research use only. MNIST: LeCun, Cortes, Burges.
"""
import contextlib
import functools
import gzip
import hashlib
import http.client
import itertools
import math
import os
import struct
import sys
import urllib.request
import uuid
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class DataError(Exception):
    """A data set cannot be had; the text is one line that says which file or argument, and why."""


class Spec(NamedTuple):
    """What is known about a data set before it is loaded."""
    classes: tuple         # names, in the order of the labels
    cameras: int           # how many views of a scene there are, at most: the channels
    size: int              # stored height and width
    crop: int              # height and width that the network sees
    brightness: float      # strengths of the augmentation, see `augment`: smallNORB's were chosen
    contrast: float        # on held-out toys; the author's 2.0 and 0.5 slow the start of learning
    most: int              # images in a published split; no file may hold more
    info: tuple            # lowest and highest (instance, elevation, azimuth, lighting)


TOYS = ("animal", "human", "airplane", "truck", "car")
POSES = ((0, 0, -1, 0), (9, 8, 34, 5))
SPECS = {
    "toys": Spec(TOYS, 1, 48, 32, 0.5, 0.25, 24300, POSES),
    "mnist": Spec(tuple("0123456789"), 1, 32, 28, 0.0, 0.0, 60000, ((-1,) * 4, (-1,) * 4)),
    "smallnorb": Spec(TOYS, 2, 48, 32, 0.2, 0.2, 24300, POSES),
}


class Dataset(NamedTuple):
    """One split, as CPU tensors. Columns of `info`: instance, elevation, azimuth, lighting.

    -1 is unknown. As in smallNORB, elevation 0-8 counts steps of 5 degrees from 30, and azimuth
    0, 2, ..., 34 is in tens of degrees.
    """
    images: torch.Tensor   # (N, C, H, W) uint8
    labels: torch.Tensor   # (N,) int64
    info: torch.Tensor     # (N, 4) int64


# ---------------------------------------------------------------------------- what training uses

def standardise(images):
    """uint8 (B, C, H, W) to float32, each image to zero mean and unit variance; constant ones to 0.

    The statistics are those of the whole image, all channels together, before any crop.
    """
    pixels = images.float()
    # Sums of so few integers are exact in float32, and so a constant image gives exact zeros.
    pixels = pixels - pixels.sum((1, 2, 3), keepdim=True) / pixels[0].numel()
    deviation = pixels.square().mean((1, 2, 3), keepdim=True).sqrt()
    return pixels / deviation.clamp_min(1e-3)  # of one level in one pixel: above 1e-2


def crops(images, size, per_side=1):
    """The per_side x per_side windows (B, C, size, size) of (B, C, H, W), row by row: the middles
    of equal parts of all places, so that per_side=1 is the central crop. size is at most H and W.
    """
    tops, lefts = ([(n - size) * (2 * i + 1) // (2 * per_side) for i in range(per_side)]
                   for n in images.shape[2:])
    return [images[:, :, top:top + size, left:left + size] for top in tops for left in lefts]


def augment(images, size, brightness, contrast, generator):
    """Random crop, contrast and brightness, drawn for each image alone; the training distortion.

    images: (B, C, H, W) float32, standardised. Returns (B, C, size, size): a window at a uniformly
    drawn place, times U(1 - contrast, 1 + contrast), plus U(-brightness, brightness).
    generator: torch.Generator on the device of the images, the only source of randomness.
    """
    count, channels, height, width = images.shape
    device = images.device

    def uniform(strength):
        drawn = torch.rand(count, 1, 1, 1, generator=generator, device=device)
        return strength * (2 * drawn - 1)

    def places(room):
        start = torch.randint(room - size + 1, (count, 1), generator=generator, device=device)
        return start + torch.arange(size, device=device)

    rows, columns = places(height)[:, None, :, None], places(width)[:, None, None, :]
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return images[image, channel, rows, columns] * (1 + uniform(contrast)) + uniform(brightness)


def split_validation(name, train):
    """(fit, validation) from a training Dataset: the protocol for choosing anything.

    toys, smallnorb: the highest training instance of every category is held out, so that
    validation, like the test, is on toys never seen. mnist: the last twelfth, 5,000 of 60,000.
    """
    count = len(train.labels)
    if name == "mnist":
        held = torch.arange(count) >= count - count // 12
    else:
        held = train.info[:, 0] == train.info[:, 0].max()
    if held.all() or not held.any():
        raise DataError(f"{name}: {count} training images are too few to hold some out, "
                        "expected 12 (mnist) or two instances (toys, smallnorb)")
    return Dataset(*(part[~held] for part in train)), Dataset(*(part[held] for part in train))


# ------------------------------------------------------------------------- messages and safe files

def _note(text):
    print(text, file=sys.stderr, flush=True)


def _progress(text, last=False):
    if last or sys.stderr.isatty():  # a log gets only the end of it
        print(text, end="\n" if last else "\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _written_aside(path):
    """A new file that becomes `path` at the end, whole, or on any failure leaves no trace."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the official files

class Layout(NamedTuple):
    """A kind of official file: a header in which only the number of items is open, then items."""
    header: str            # as struct has it
    fields: tuple          # what the header holds, None for the number of items
    dtype: str
    item: tuple            # shape of one item


# .mat: magic, number of dimensions, the dimensions (three at least, filled up with ones).
# idx: magic (type and number of dimensions), the dimensions, big-endian.
PAIRS = Layout("<6i", (0x1E3D4C55, 4, None, 2, 96, 96), "u1", (2, 96, 96))
CATEGORIES = Layout("<5i", (0x1E3D4C54, 1, None, 1, 1), "<i4", ())
INFO = Layout("<5i", (0x1E3D4C54, 2, None, 4, 1), "<i4", (4,))
DIGITS = Layout(">4i", (0x803, None, 28, 28), "u1", (28, 28))
DIGIT_LABELS = Layout(">2i", (0x801, None), "u1", ())


class Source(NamedTuple):
    """A published file: `name`.gz has `size` bytes and `sha256`; `content` is that of `name`."""
    name: str
    layout: Layout
    size: int
    content: str           # the first 16 digits are enough for a warning; "" where not published
    sha256: str


_TRAIN = "smallnorb-5x46789x9x18x6x2x96x96-training-"
_TEST = "smallnorb-5x01235x9x18x6x2x96x96-testing-"
SOURCES = {  # of each data set: images, labels and info of the training split, then of the test
    "smallnorb": (
        Source(_TRAIN + "dat.mat", PAIRS, 131896188, "4813bf104d229583",
               "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873"),
        Source(_TRAIN + "cat.mat", CATEGORIES, 348, "591ed90c090cb672",
               "2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa"),
        Source(_TRAIN + "info.mat", INFO, 71052, "",
               "de7eb932ebe7a4ee16217fead60660d0eb3d23632c2f4d1c51f88c501c17bf32"),
        Source(_TEST + "dat.mat", PAIRS, 130799817, "2b1de646c57ffdc2",
               "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474"),
        Source(_TEST + "cat.mat", CATEGORIES, 347, "591ed90c090cb672",
               "ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff"),
        Source(_TEST + "info.mat", INFO, 10428, "318f817236b7c97a",
               "16adf314226327ee006d1a44db8cfef52773c06c829951d5653a9f6f310248a2")),
    "mnist": (
        Source("train-images-idx3-ubyte", DIGITS, 9912422, "ba891046e6505d7a",
               "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        Source("train-labels-idx1-ubyte", DIGIT_LABELS, 28881, "65a50cbbf4e906d7",
               "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        Source("t10k-images-idx3-ubyte", DIGITS, 1648877, "0fa7898d509279e4",
               "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        Source("t10k-labels-idx1-ubyte", DIGIT_LABELS, 4542, "ff7bcfd416de3373",
               "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6")),
    "toys": (),
}
MIRRORS = {
    "smallnorb": ("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",),
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"),
}
TIMEOUT = 30  # seconds without an answer


def _download(path, source, mirrors):
    """Put the published file at `path`, from the first mirror that has it right."""
    reasons = []
    for mirror in mirrors:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _written_aside(path) as file, \
                    urllib.request.urlopen(mirror + path.name, timeout=TIMEOUT) as reply:
                digest, done = hashlib.sha256(), 0
                while done <= source.size and (block := reply.read(1 << 19)):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    _progress(f"{path.name}: {100 * done // source.size} % of "
                              f"{source.size / 1e6:.1f} MB", last=done == source.size)
                if done != source.size:
                    raise OSError(f"{done} bytes came, expected {source.size}: "
                                  "an error page, or cut off")
                if digest.hexdigest() != source.sha256:
                    raise OSError("the bytes that came have the wrong sha256")
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            reasons.append(f"{mirror}: {' '.join(str(error).split())}")
    raise DataError(f"{path}: download failed ({'; '.join(reasons)}); get "
                    f"{mirrors[0]}{path.name} by other means and put it in {path.parent}")


def _read(path, source, most, convert):
    """The items of a raw or .gz file, through `convert` slice by slice, as one array.

    No length that the file claims is believed beyond `most` items, and no more is read than that.
    """
    layout, dtype, digest = source.layout, np.dtype(source.layout.dtype), hashlib.sha256()

    def take(length):
        data = file.read(length)
        digest.update(data)
        if len(data) < length:
            raise DataError(f"{path}: ends too early, expected {length - len(data)} more bytes")
        return data

    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = struct.unpack(layout.header, take(struct.calcsize(layout.header)))
            count = header[layout.fields.index(None)]
            expected = tuple(count if field is None else field for field in layout.fields)
            if header != expected or not 1 <= count <= most:
                wanted = tuple(f"1..{most}" if f is None else f for f in layout.fields)
                raise DataError(f"{path}: header {header}, expected {wanted}")
            slices = []
            for start in range(0, count, 500):
                shape = (min(500, count - start),) + layout.item
                data = take(math.prod(shape) * dtype.itemsize)
                slices.append(convert(np.frombuffer(data, dtype).reshape(shape)))
            if file.read(1):
                raise DataError(f"{path}: goes on after the {count} items of its header")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}), expected "
                        "the published file; replace or remove it") from error
    if source.content and not digest.hexdigest().startswith(source.content):
        _note(f"warning: {path}: the content is not what was published (sha256 "
              f"{digest.hexdigest()[:16]}..., expected {source.content}...)")
    return np.concatenate(slices)


def _halve(cameras, pairs):
    """(n, 2, 96, 96) uint8 to (n, cameras, 48, 48), by the rounded mean of 2x2 pixels."""
    wide = pairs[:, :cameras].astype(np.uint16)
    rows = wide[:, :, ::2] + wide[:, :, 1::2]
    return ((rows[..., ::2] + rows[..., 1::2] + 2) // 4).astype(np.uint8)


def _pad(digits):
    """(n, 28, 28) uint8 to (n, 1, 32, 32), zeros around."""
    return np.pad(digits, ((0, 0), (2, 2), (2, 2)))[:, None]


def _check(name, dataset, names):
    """Raise DataError unless counts agree and all values are in range; `names`: what to blame."""
    spec = SPECS[name]
    for part, blame in zip(dataset[1:], names[1:]):
        if len(part) != len(dataset.images):
            raise DataError(f"{blame}: has {len(part)} items, expected {len(dataset.images)} "
                            f"as in {names[0]}")
    for part, blame, what, low, high in (
            (dataset.labels, names[1], "labels", 0, len(spec.classes) - 1),
            (dataset.info, names[2], "info", *map(torch.tensor, spec.info))):
        bad = (part < low) | (part > high)
        if bad.any():
            raise DataError(f"{blame}: {what} {part[bad][0]} out of range, expected "
                            f"{torch.as_tensor(low).tolist()} to {torch.as_tensor(high).tolist()}")
    azimuth = dataset.info[:, 2]
    if ((azimuth > 0) & (azimuth % 2 == 1)).any():
        raise DataError(f"{names[2]}: odd azimuth, expected -1 or 0, 2, ..., 34")
    if name == "smallnorb" and len(dataset.labels) == spec.most:  # a flipped bit stays in range
        toys = torch.bincount(dataset.labels * 10 + dataset.info[:, 0], minlength=50)
        if (toys[toys > 0] != spec.most // 25).any():
            raise DataError(f"{names[1]}, {names[2]}: {toys.max()} images of one toy, expected "
                            f"{spec.most // 25} of each")


def _read_split(name, sources, paths, cameras):
    convert = _pad if name == "mnist" else functools.partial(_halve, cameras)
    images = torch.from_numpy(_read(paths[0], sources[0], SPECS[name].most, convert))
    labels, *info = (
        torch.from_numpy(_read(path, source, SPECS[name].most, lambda rows: rows.astype(np.int64)))
        for path, source in zip(paths[1:], sources[1:]))
    dataset = Dataset(images, labels, info[0] if info else torch.full((len(labels), 4), -1))
    _check(name, dataset, [*paths, "info"])
    return dataset


# -------------------------------------------------------------------------------------- the toys

TOY_SEED = 1
TOY_LIGHTS = ((-50.0, 50.0, 0.35), (70.0, 35.0, 0.25))  # azimuth, elevation (degrees), ambient
TRAIN_INSTANCES, TEST_INSTANCES = (4, 6, 7, 8, 9), (0, 1, 2, 3, 5)
GROUND = 0.85  # lighter than all toys, as in smallNORB


class Part(NamedTuple):
    """A solid: the unit ball or the cube [-1, 1]^3, under x -> centre + inverse(to_unit) x."""
    box: bool
    centre: torch.Tensor   # (3,)
    to_unit: torch.Tensor  # (3, 3)
    albedo: float


def _part(kind, centre, radii, albedo, pitch=0.0, yaw=0.0):
    """x is forward, y left, z up; pitch (degrees) lifts the front, yaw turns it to the left."""
    p, y = math.radians(pitch), math.radians(yaw)
    lift = torch.tensor([[math.cos(p), 0, -math.sin(p)], [0, 1, 0], [math.sin(p), 0, math.cos(p)]])
    turn = torch.tensor([[math.cos(y), -math.sin(y), 0], [math.sin(y), math.cos(y), 0], [0, 0, 1]])
    to_unit = (turn @ lift).T / torch.tensor(radii)[:, None]
    return Part(kind == "box", torch.tensor(centre), to_unit, albedo)


# The five builders below get `u(low, high)`, which draws a number, and give a list of parts. The
# unit of length is half the width of the window that the network sees.

def _animal(u):
    length, fat, leg, thick, shade = u(.42, .62), u(.15, .25), u(.22, .48), u(.045, .08), u(.18, .6)
    neck, lean, head, high = u(.12, .42), u(25, 75), u(.1, .17), leg + .8 * fat
    reach, rise = neck * math.cos(math.radians(lean)), neck * math.sin(math.radians(lean))
    nape_x, nape_z = .8 * length, high + .3 * fat
    legs = [_part("box", (fore * .7 * length, side * .6 * fat, leg / 2 + .02),
                  (thick, thick, leg / 2 + .02), .85 * shade, pitch=u(-12, 12))
            for fore in (-1, 1) for side in (-1, 1)]
    return legs + [
        _part("ball", (0., 0., high), (length, fat, fat), shade),
        _part("ball", (nape_x + reach / 2, 0., nape_z + rise / 2), (neck / 2 + .1, .09, .1), shade,
              pitch=lean),
        _part("ball", (nape_x + reach + .05, 0., nape_z + rise), (1.4 * head, .8 * head, head),
              u(.7, 1) * shade, pitch=u(-30, 5)),
        _part("ball", (-length - .1, 0., high + u(-.1, .15)), (u(.1, .25), .04, .04), shade,
              pitch=u(-60, 50))]


def _human(u):
    leg, trunk, wide, thick, head = u(.5, .68), u(.42, .55), u(.16, .26), u(.06, .09), u(.11, .15)
    skin, shirt, trousers, stride, neck = u(.25, .6), u(.15, .6), u(.15, .55), u(0, 25), leg + trunk
    parts = [_part("ball", (0., 0., leg + trunk / 2), (.13, wide, trunk / 2 + .08), shirt),
             _part("ball", (u(-.02, .06), 0., neck + head), (head, .9 * head, 1.2 * head), skin)]
    for side in (-1, 1):
        raised, arm = u(-60, 60), trunk / 2
        ahead, down = arm * math.sin(math.radians(raised)), arm * math.cos(math.radians(raised))
        parts += [
            _part("box", (side * math.tan(math.radians(stride)) * leg / 2, side * wide / 2,
                          leg / 2), (thick, thick, leg / 2 + .03), trousers, pitch=side * stride),
            _part("ball", (ahead, side * (wide + .04), neck - down), (thick, thick, arm + .06),
                  shirt if u(0, 1) < .6 else skin, pitch=-raised)]
    return parts


def _airplane(u):
    length, fat, up, shade = u(.68, .88), u(.09, .14), u(.16, .26), u(.25, .62)
    span, chord, place, sweep = u(.3, .42), u(.1, .2), u(-.1, .18), u(-3, 38)
    wing, tail, fin, jets = up + u(-.6, .9) * fat, u(.11, .18), u(.14, .24), u(0, 1) < .6
    back, out, dark = math.sin(math.radians(sweep)), math.cos(math.radians(sweep)), u(.6, 1) * shade
    parts = [_part("ball", (0., 0., up), (length, fat, fat), shade),
             _part("box", (.12 - length, 0., up + .7 * fin), (.1, .02, fin), dark, pitch=u(-5, 25)),
             _part("box", (.1, 0., up / 2), (.03, .1, up / 2), .2)]
    for side in (-1, 1):
        parts += [
            _part("box", (place - back * span, side * out * span, wing), (chord, span, .025), dark,
                  yaw=side * sweep),
            _part("box", (.13 - length - back * tail, side * out * tail, up + .03),
                  (chord / 2, tail, .02), dark, yaw=side * sweep)]
        if jets:
            parts.append(_part("ball", (place - .9 * back * span + chord, .9 * side * out * span,
                                        wing - .07), (.15, .06, .06), .6 * shade))
    return parts


def _wheels(axles, half, radius):
    return [_part("ball", (axle, side * half, radius), (radius, .06, radius), .12)
            for axle in axles for side in (-1, 1)]


def _truck(u):
    length, half, radius, bonnet = u(.62, .82), u(.2, .27), u(.1, .15), u(0, .16)
    cab, cab_high, load_high, floor = u(.14, .24), u(.12, .19), u(.04, .21), 1.3 * radius
    shade, load_shade, bed = u(.18, .6), u(.18, .6), length - cab - .03
    tank = u(0, 1) < .25
    load = .21 if tank else load_high
    return _wheels((.68 * length, -.7 * length, -u(.1, .5) * length), .9 * half, radius) + [
        _part("ball" if tank else "box", (-cab - .03, 0., floor + load), (bed, half, load),
              load_shade),
        _part("box", (0., 0., floor), (length, .8 * half, .05), .15),
        _part("box", (length - cab - bonnet, 0., floor + cab_high),
              (cab, .95 * half, cab_high + .03), shade),
        _part("box", (length - .08, 0., floor + .08), (.1, .85 * half, .1), shade)]


def _car(u):
    length, half, radius, high = u(.55, .78), u(.22, .3), u(.11, .15), u(.11, .18)
    roof, cabin, place, floor = u(.1, .2), u(.26, .46), u(-.22, .02), .8 * radius
    shade, glass, rounded = u(.18, .6), u(.15, .6), u(0, 1) < .5
    return _wheels((.62 * length, -.62 * length), .95 * half, radius) + [
        _part("box", (0., 0., floor + high), (.93 * length, half, .9 * high), shade),
        _part("ball", (0., 0., floor + high), (length + .06, half, high), shade),
        _part("ball" if rounded else "box", (place, 0., floor + 2 * high),
              (cabin, .85 * half, roof), glass)]


_BUILDERS = (_animal, _human, _airplane, _truck, _car)


def _nearest(origins, directions, parts, distance):
    """First hit of rays on parts. origins (3, V, R), directions (3, V, 1), distance (V, R) so far.

    Returns the distance (V, R) of the nearest hit ahead and its part, len(parts) for none nearer.
    """
    which = torch.full_like(distance, len(parts), dtype=torch.long)
    for index, part in enumerate(parts):
        o = (part.to_unit @ (origins.flatten(1) - part.centre[:, None])).view_as(origins)
        d = (part.to_unit @ directions.flatten(1)).view_as(directions)
        if part.box:
            d = torch.where(d.abs() < 1e-5, 1e-5, d)
            side, middle = 1 / d.abs(), -o / d
            enter, leave = (middle - side).amax(0), (middle + side).amin(0)
            hit = enter < leave
        else:
            a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1
            root = b * b - a * c
            enter, hit = (-b - root.clamp_min(0).sqrt()) / a, root > 0
        hit &= (enter > 0) & (enter < distance)
        distance = torch.where(hit, enter, distance)
        which.masked_fill_(hit, index)
    return distance, which


def _normals(points, which, parts):
    """Outward unit normals (3, V, R) at points (3, V, R) on the parts `which`, up on the ground."""
    normals = torch.zeros_like(points)
    normals[2] = 1
    for index, part in enumerate(parts):
        on = which == index
        unit = part.to_unit @ (points[:, on] - part.centre[:, None])
        if part.box:
            unit = unit * (unit.abs() == unit.abs().amax(0))
        normals[:, on] = torch.nn.functional.normalize(part.to_unit.T @ unit, dim=0)
    return normals


def _towards(azimuth, elevation):
    """Unit vectors (3, V, 1) for angles in degrees, (V,)."""
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    return torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()])[..., None]


def _render(parts, azimuth, elevation, jitter):
    """(V x lights, 1, 48, 48) uint8: orthographic views; jitter (V, 3) of scale and place."""
    size = SPECS["toys"].size
    # Two rays a pixel, on its diagonal, smooth most of the edges at half the price of four.
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    across = torch.stack([x + .25, x + .75]).flatten() * (2 / size) - 1
    upward = 1 - torch.stack([y + .25, y + .75]).flatten() * (2 / size)
    scale = 1.5 * (1 + .1 * jitter[:, :1])
    across, upward = scale * across + .08 * jitter[:, 1:2], scale * upward + .08 * jitter[:, 2:]
    eye = _towards(azimuth, elevation)
    right = _towards(azimuth + 90, torch.zeros_like(elevation))
    up = torch.cross(eye, right, dim=0)
    middle = torch.tensor([0, 0, .3])[:, None, None]
    origins = middle + 8 * eye + right * across + up * upward
    distance, which = _nearest(origins, -eye, parts, origins[2] / eye[2])
    points = origins - distance * eye
    normals = _normals(points, which, parts)
    albedo = torch.tensor([part.albedo for part in parts] + [GROUND])[which]
    images = []
    for light_azimuth, light_elevation, ambient in TOY_LIGHTS:
        # The lamps stand still while the toy turns, so they turn with the camera around the toy.
        lamp = _towards(azimuth + light_azimuth, torch.full_like(azimuth, light_elevation))
        far = torch.full_like(distance, torch.inf)
        lit = _nearest(points + 1e-3 * normals, lamp, parts, far)[1] == len(parts)
        lambert = (normals * lamp).sum(0).clamp_min(0) * lit
        images.append(albedo * (ambient + (1 - ambient) * lambert))
    pixels = torch.stack(images, 1).unflatten(2, (2, size, size)).mean(2)
    return (255 * pixels).round().clamp(0, 255).byte().flatten(0, 1)[:, None]


def render_toys(instances, elevations=range(9), azimuths=range(18)):
    """The Dataset of toys, of all categories, for some instances 0-9; the same on every call.

    A stand-in for smallNORB with its categories, split, poses and labels: each instance is put
    together from ellipsoids and boxes of random proportions and shades, ray-cast with Lambertian
    shading and shadows on a plain ground under each of TOY_LIGHTS. Azimuths count steps of 20
    degrees. An image does not depend on what else is rendered.
    """
    images, labels, info = [], [], []
    # One thread, and few views at a time: the tensors are small and stay in the processor's cache.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for category, instance in itertools.product(range(len(TOYS)), instances):
            generator = torch.Generator().manual_seed(1000 * TOY_SEED + 10 * category + instance)
            jitter = torch.rand(9, 18, 3, generator=generator) * 2 - 1
            parts = _BUILDERS[category](lambda low, high: low + (high - low) * torch.rand(
                (), generator=generator).item())
            views = list(itertools.product(elevations, azimuths))
            for start in range(0, len(views), 6):
                rise, turn = torch.tensor(views[start:start + 6]).T
                images.append(_render(parts, 20.0 * turn, 30 + 5.0 * rise, jitter[rise, turn]))
            for (rise, turn), light in itertools.product(views, range(len(TOY_LIGHTS))):
                labels.append(category)
                info.append((instance, rise, 2 * turn, light))
            _progress(f"rendering toys: {category + 1} of 5 categories")
    finally:
        torch.set_num_threads(threads)
    _progress(f"rendered {len(labels)} images of toys", last=True)
    return Dataset(torch.cat(images), torch.tensor(labels), torch.tensor(info))


# ------------------------------------------------------------------------------- cache and loading

# What a cache was made by; a number goes up when the pixels change.
FORMATS = {"toys": f"toys 1 {TOY_SEED} {TOY_LIGHTS}", "mnist": "mnist 1",
           "smallnorb": "smallnorb 1"}
_PARTS = tuple(f"{split}_{field}" for split in ("train", "test") for field in Dataset._fields)


def _load_cache(path, name, cameras, recipe):
    """(train, test) of a cache made in this format from the files in `recipe`, otherwise None."""
    spec, fits = SPECS[name], {"images": (np.uint8, (cameras, SPECS[name].size, SPECS[name].size)),
                               "labels": (np.int64, ()), "info": (np.int64, (4,))}

    def member(key, dtype, item, most):
        # np.load believes the shape that a file declares; this does not before it is plausible.
        with archive.open(key + ".npy") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("npy version")
            shape, fortran, found = np.lib.format.read_array_header_1_0(file)
            if fortran or found != dtype or shape[1:] != item or not 1 <= shape[0] <= most:
                raise ValueError("npy header")
            data = bytearray(file.read(math.prod(shape) * found.itemsize))
            if file.read(1):  # reading to the end also makes zipfile compare the checksum
                raise ValueError("npy length")
        return torch.from_numpy(np.frombuffer(data, found).reshape(shape))

    try:
        with zipfile.ZipFile(path) as archive:
            made_from = bytes(member("recipe", np.uint8, (), 10_000)).decode().split("\n")
            if not set(recipe) <= set(made_from):
                return None
            parts = [member(key, *fits[key.split("_")[1]], spec.most) for key in _PARTS]
        splits = Dataset(*parts[:3]), Dataset(*parts[3:])
        for dataset in splits:
            _check(name, dataset, [path] * 3)
        return splits
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged or hostile archive can raise anything
        reason = " ".join(f"{type(error).__name__} {error}".split())
        _note(f"warning: {path}: not a usable cache ({reason}), made anew")
        return None


def _save_cache(path, splits, recipe):
    arrays = dict(zip(_PARTS, (part.numpy() for dataset in splits for part in dataset)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _written_aside(path) as file:
            text = np.frombuffer("\n".join(recipe).encode(), np.uint8)
            np.savez_compressed(file, recipe=text, **arrays)
    except (OSError, ValueError) as error:
        _note(f"warning: {path}: cannot be written ({error}), going on without cache")


def load(name, data_dir="datasets", cameras=1):
    """(train, test) Datasets of "toys", "mnist" or "smallnorb", from files in data_dir/name.

    The official files are used where they are, raw or .gz, and downloaded where they are not. The
    result is cached there; the cache serves as long as no official file beside it has changed,
    and also alone. cameras: 1 or, for smallnorb, 2; they become the channels. Raises DataError.
    """
    if name not in SPECS:
        raise DataError(f"data set {name!r}: unknown, expected one of {', '.join(SPECS)}")
    if cameras not in range(1, SPECS[name].cameras + 1):
        raise DataError(f"cameras {cameras}: {name} has 1 to {SPECS[name].cameras}")
    folder = Path(data_dir) / name
    cache = folder / f"cache-{cameras}.npz"

    def present(source):
        found = (folder / (source.name + ending) for ending in ("", ".gz"))
        return next((path for path in found if os.path.isfile(path)), None)

    def recipe():
        stats = [(path.name, path.stat()) for path in map(present, SOURCES[name]) if path]
        return [FORMATS[name], *(f"{file} {s.st_size} {s.st_mtime_ns}" for file, s in stats)]

    if splits := _load_cache(cache, name, cameras, recipe()):
        return splits
    for source in SOURCES[name]:
        if not present(source):
            _download(folder / (source.name + ".gz"), source, MIRRORS[name])
    made_from = recipe()
    if name == "toys":
        splits = render_toys(TRAIN_INSTANCES), render_toys(TEST_INSTANCES)
    else:
        paths = [present(source) for source in SOURCES[name]]
        half = len(paths) // 2  # the files of the training split, then those of the test
        splits = tuple(_read_split(name, SOURCES[name][part], paths[part], cameras)
                       for part in (slice(half), slice(half, None)))
    _save_cache(cache, splits, made_from)
    return splits
