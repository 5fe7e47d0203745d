"""The data: toys (rendered here, the default), MNIST and smallNORB; their augmentation.

`load` gives a training and a test `Dataset`; `hold_out` takes a validation set out of the first.
Images stay uint8 until `standardise`; `augment` and `crops` then cut the window that the network
sees.

smallNORB: LeCun, Huang and Bottou, "Learning methods for generic object recognition with
invariance to pose and lighting", CVPR 2004; for research use only. MNIST: LeCun, Cortes, Burges.
"""

import gzip
import io
import math
import os
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class DataError(Exception):
    """A file that is bad, or cannot be had; the text is one line: which, and why."""


class Spec(NamedTuple):
    """What is known about a data set before it is loaded."""

    classes: tuple  # names, in the order of the labels
    crop: int       # height and width that the network sees
    jitter: float   # of brightness and contrast, see `augment`


TOYS = ("animal", "human", "airplane", "truck", "car")
SPECS = {
    "toys": Spec(TOYS, 32, 0.2),
    "mnist": Spec(tuple("0123456789"), 28, 0.0),
    "smallnorb": Spec(TOYS, 32, 0.2),
}


class Dataset(NamedTuple):
    """One split."""

    images: torch.Tensor     # (N, C, H, W) uint8
    labels: torch.Tensor     # (N,) int64
    instances: torch.Tensor  # (N,) int64: which toy of its class; of MNIST, which twelfth


def load(name, data_dir="datasets", cameras=1):
    """(train, test) Datasets of "toys", "mnist" or "smallnorb", from files in data_dir/name.

    Toys are rendered. The official files, raw or .gz, are used if they are there and downloaded if
    not. The result is cached there; later calls need nothing but the cache.
    cameras: 1 or, for smallnorb, 2; they become the channels. Raises DataError, OSError.
    """
    assert cameras == 1 or (name, cameras) == ("smallnorb", 2), f"{name}: not {cameras} cameras"
    folder = Path(data_dir) / name
    cache = folder / f"cache-{cameras}.pt"
    if cache.exists():
        print(f"data: {cache}; delete it to have it made anew", file=sys.stderr)
        try:
            cached = torch.load(cache, weights_only=True)
            return Dataset(*cached["train"]), Dataset(*cached["test"])
        except Exception as error:  # a damaged or hostile file can raise anything
            raise DataError(f"{cache}: not a usable cache ({type(error).__name__}), delete it")
    folder.mkdir(parents=True, exist_ok=True)
    if name == "toys":
        print("rendering toys", file=sys.stderr)
        splits = render_toys(range(10)), render_toys(range(10, 20))
    else:
        arrays, half = [_read(folder, *file) for file in FILES[name]], len(FILES[name]) // 2
        splits = tuple(_dataset(name, cameras, *part) for part in (arrays[:half], arrays[half:]))
    save(cache, {"train": tuple(splits[0]), "test": tuple(splits[1])})
    return splits


def save(path, content):
    """torch.save, whole at once: what `path` held before stays until the new file is on disk."""
    torch.save(content, buffer := io.BytesIO())  # to a full disk it would raise a RuntimeError
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the official files

_TRAIN = "smallnorb-5x46789x9x18x6x2x96x96-training-"
_TEST = "smallnorb-5x01235x9x18x6x2x96x96-testing-"
# Images, labels (and info) of the training split, then of the test: name, bytes before the array,
# its type and shape, and the first half of the sha256 of name.gz.
FILES = {}
FILES["smallnorb"] = (
    (_TRAIN + "dat.mat", 24, "u1", (24300, 2, 96, 96), "5ffd6272a07d32695ee1082a26a41a93"),
    (_TRAIN + "cat.mat", 20, "<i4", (24300,), "2784e542c1922060691090952b6cd627"),
    (_TRAIN + "info.mat", 20, "<i4", (24300, 4), "de7eb932ebe7a4ee16217fead60660d0"),
    (_TEST + "dat.mat", 24, "u1", (24300, 2, 96, 96), "cf7104eed3e51174d2f65b66d1e5878b"),
    (_TEST + "cat.mat", 20, "<i4", (24300,), "ecaf6d5bb8c3bc5eab9cf0258f6d2198"),
    (_TEST + "info.mat", 20, "<i4", (24300, 4), "16adf314226327ee006d1a44db8cfef5"))
FILES["mnist"] = (
    ("train-images-idx3-ubyte", 16, "u1", (60000, 28, 28), "440fcabf73cc546fa21475e81ea37026"),
    ("train-labels-idx1-ubyte", 8, "u1", (60000,), "3552534a0a558bbed6aed32b30c495cc"),
    ("t10k-images-idx3-ubyte", 16, "u1", (10000, 28, 28), "8d422c7b0a1c1c79245a5bcf07fe86e3"),
    ("t10k-labels-idx1-ubyte", 8, "u1", (10000,), "f7ae60f92e00ec6debd23a6088c31dbd"))
MIRROR = {"smallnorb": "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
          "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/"}


def _read(folder, name, header, dtype, shape, sha256):
    """The array of a published file, raw or .gz; downloaded if it is not there."""
    path = folder / name if (folder / name).exists() else folder / (name + ".gz")
    if not path.exists():
        url, names = MIRROR[folder.name] + path.name, ", ".join(n for n, *_ in FILES[folder.name])
        print(f"downloading {url}", file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)
        except Exception as error:  # no network, a full disk, or another hash, as when cut off
            raise DataError(f"{url}: download failed ({error}); put in {folder}: {names}")
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":  # not by its name: browsers may unpack a .gz
            content = gzip.decompress(content)
        return np.frombuffer(content, dtype, offset=header).reshape(shape)
    except Exception as error:  # of gzip, zlib or numpy
        raise DataError(f"{path}: not as published ({error}); replace or remove it") from error


def _dataset(name, cameras, pixels, labels, info=None):
    if name == "mnist":  # zeros around, so that there is room for random crops
        images = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None]
        instances = np.arange(len(labels)) * 12 // len(labels)
    else:  # from 96x96 to 48x48, by the rounded mean of 2x2 pixels
        blocks = pixels[:, :cameras].reshape(-1, cameras, 48, 2, 48, 2)
        images = ((blocks.sum((3, 5), dtype=np.uint16) + 2) // 4).astype(np.uint8)
        instances = info[:, 0]
    return Dataset(torch.from_numpy(images), *torch.from_numpy(np.int64([labels, instances])))


# ---------------------------------------------------------------------------- what training uses


def standardise(images):
    """uint8 (B, C, H, W) to float32, each image to zero mean and unit variance; constant ones to 0.

    The statistics are those of the whole image, all channels together, before any crop.
    """
    pixels = images.float()
    # Sums of so few integers are exact in float32, and so a constant image gives exact zeros.
    pixels = pixels - pixels.sum((1, 2, 3), keepdim=True) / pixels.shape[1:].numel()
    deviation = pixels.square().mean((1, 2, 3), keepdim=True).sqrt()
    return pixels / deviation.clamp_min(1e-3)  # one pixel off by one level gives more


def crops(images, size, per_side=1):
    """The per_side x per_side windows (B, C, size, size) of (B, C, H, W), row by row, at the
    midpoints of per_side equal intervals: 1 is the central crop. size is at most H and W."""
    tops, lefts = ([(n - size) * (2 * i + 1) // (2 * per_side) for i in range(per_side)]
                   for n in images.shape[2:])
    return [images[:, :, top:top + size, left:left + size] for top in tops for left in lefts]


def augment(images, spec):
    """(B, C, H, W) standardised -> (B, C, crop, crop): of each image a window at a random place,
    times U(1 - jitter, 1 + jitter), plus U(-jitter, jitter), as in spec."""
    count, size = len(images), spec.crop
    tops, lefts = (torch.randint(n - size + 1, (count,)) for n in images.shape[2:])
    windows = images.unfold(2, size, 1).unfold(3, size, 1)[torch.arange(count), :, tops, lefts]
    gain, shift = 2 * torch.rand(2, count, 1, 1, 1, device=images.device) - 1
    return windows * (1 + spec.jitter * gain) + spec.jitter * shift


def hold_out(train, instance):
    """(fit, validation) from a training Dataset: the protocol for choosing anything.

    All images of one instance of every class are held out, so that validation, like the test, is
    on toys never seen; of MNIST a twelfth, 5,000 images.
    """
    held = train.instances == instance
    assert held.any(), f"instance {instance}: expected one of {train.instances.unique().tolist()}"
    return Dataset(*(part[~held] for part in train)), Dataset(*(part[held] for part in train))


# -------------------------------------------------------------------------------------- the toys

# Ellipsoids: centre (forward, left, up), radii, shade. Those with left > 0 have a mirror image.
SOLIDS = (
    ((0, 0, .62, .46, .19, .2, 1), (.5, 0, .84, .14, .1, .2, 1), (.64, 0, 1., .19, .11, .12, .9),
     (.34, .11, .24, .07, .07, .3, .8), (-.34, .11, .24, .07, .07, .3, .8),
     (-.55, 0, .66, .2, .04, .05, .8), (.56, .08, 1.12, .04, .04, .08, .7)),  # animal
    ((0, 0, .82, .13, .19, .3, 1), (.02, 0, 1.28, .13, .12, .16, 1.6),
     (.02, .26, .8, .06, .06, .3, 1.2), (0, .1, .28, .09, .08, .34, .6)),  # human
    ((0, 0, .4, .8, .12, .13, 1), (0, .44, .4, .17, .46, .03, .8),
     (-.68, .17, .46, .1, .2, .02, .8), (-.7, 0, .58, .12, .02, .2, .8),
     (.12, .3, .3, .15, .06, .06, .6)),  # airplane
    ((-.22, 0, .52, .56, .24, .36, 1), (.52, 0, .36, .2, .22, .26, 1.5),
     (.5, .2, .12, .12, .06, .12, .3), (-.2, .22, .12, .12, .06, .12, .3),
     (-.55, .22, .12, .12, .06, .12, .3)),  # truck
    ((0, 0, .24, .68, .28, .14, 1), (-.06, 0, .4, .34, .23, .17, 1.5),
     (.4, .24, .12, .13, .06, .12, .3), (-.4, .24, .12, .13, .06, .12, .3)),  # car
)


def _hits(origin, direction, parts):
    """Distance (V, parts, R) at which rays, (V, R, 3) and (V, 1, 3), meet ellipsoids, or inf."""
    o = (origin[:, None] - parts[:, None, :3]) / parts[:, None, 3:6]  # to unit balls
    d = direction[:, None] / parts[:, None, 3:6]
    a, b, c = d.square().sum(-1), (o * d).sum(-1), o.square().sum(-1) - 1
    root = b.square() - a * c
    distance = (-b - root.clamp_min(0).sqrt()) / a
    return torch.where((root > 0) & (distance > 1e-3), distance, math.inf)


def _towards(azimuth, elevation):
    """Unit vectors (V, 1, 3) for angles in radians, (V,)."""
    return torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(),
                        elevation.sin()], -1)[:, None]


def _render(parts, azimuth, elevation, lamp):
    """(V, 1, 40, 40) uint8: orthographic views of one toy, and its shadow on a light ground.

    Angles (V,) in radians: the camera's azimuth and elevation, and the lamp's azimuth.
    """
    n = 40  # pixels a side
    eye, light = _towards(azimuth, elevation), _towards(lamp, torch.full_like(lamp, 0.9))
    right = _towards(azimuth + math.pi / 2, torch.zeros_like(azimuth))
    up = torch.linalg.cross(eye, right)
    y, x = torch.meshgrid(*2 * [(torch.arange(n) + 0.5) * 2.1 / n - 1.05], indexing="ij")
    middle = torch.tensor([0, 0, 0.5])
    origin = middle + 4 * eye + x.reshape(-1, 1) * right - y.reshape(-1, 1) * up  # (V, R, 3)
    distance, which = _hits(origin, -eye, parts).min(1)
    ground = origin[..., 2] / eye[..., 2]
    on_ground = distance >= ground
    point = origin - torch.minimum(distance, ground)[..., None] * eye
    hit = parts[which]  # (V, R, 7)
    normal = F.normalize((point - hit[..., :3]) / hit[..., 3:6].square(), dim=-1)
    normal = torch.where(on_ground[..., None], torch.tensor([0.0, 0, 1]), normal)
    lit = _hits(point + 1e-2 * normal, light, parts).isinf().all(1)
    shade = torch.where(on_ground, 0.9, hit[..., 6].clamp_max(0.8))
    shade = shade * (0.35 + 0.65 * (normal * light).sum(-1).clamp_min(0) * lit)
    return (255 * shade).round().byte().view(-1, 1, n, n)


def render_toys(instances, views=50):
    """A stand-in for smallNORB: its categories, each instance of random proportions and shade,
    seen from above at 30 to 70 degrees from all sides. The same on every call."""
    toys, images = list(product(range(len(TOYS)), instances)), []
    for category, instance in toys:
        generator = torch.Generator().manual_seed(1000 * category + instance)
        rand = lambda *shape: 2 * torch.rand(*shape, generator=generator) - 1
        parts = torch.tensor(SOLIDS[category])
        stretch = (0.2 * rand(3)).exp()
        parts[:, :3] *= stretch
        parts[:, 3:6] *= stretch * (0.2 * rand(len(parts), 3)).exp()
        parts[:, 6] *= 0.35 + 0.2 * rand(1)
        twins = parts[parts[:, 1] > 0] * torch.tensor([1, -1, 1, 1, 1, 1, 1])
        azimuth, elevation, lamp = torch.rand(3, views, generator=generator)
        azimuth, elevation = 2 * math.pi * azimuth, torch.deg2rad(30 + 40 * elevation)
        lamp = azimuth + 0.5 + lamp  # beside the camera, to its right
        images.append(_render(torch.cat([parts, twins]), azimuth, elevation, lamp))
    return Dataset(torch.cat(images), *torch.tensor(toys).repeat_interleave(views, 0).T)
