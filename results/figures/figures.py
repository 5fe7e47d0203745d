"""The README's figures, from capsnet.py and what lies in results/: needs matplotlib.

    python results/figures/figures.py        (in the project's folder)
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project's folder
import data
from capsnet import CapsNet, SimilarityRouting, routing_objective, update_pose

HERE = Path(__file__).parent
RUNS = {"toys": HERE.parent / "toys-similarity/weights.pt",
        "smallnorb": HERE.parent / "smallnorb-similarity/weights.pt"}
plt.rcParams |= {"figure.facecolor": "white", "savefig.dpi": 110, "font.size": 9}


def save(name):
    plt.savefig(HERE / name, bbox_inches="tight")
    plt.close()
    image = Image.open(HERE / name).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(HERE / name)  # a third of the size


def routing_of(lambda1, lambda2):
    return SimilarityRouting(1, num_kernels=1, widths=(1.0, 1.0), lambda1=lambda1,
                             lambda2=lambda2, iterations=10)


def some_votes():
    """Two-dimensional votes of a cluster and of strays, (24, 2), and their activations."""
    generator = torch.Generator().manual_seed(3)
    cluster = 0.35 * torch.randn(14, 2, generator=generator) + torch.tensor([1.2, 0.8])
    strays = 1.1 * torch.randn(10, 2, generator=generator) - torch.tensor([1.0, 0.6])
    return torch.cat([cluster, strays]), 0.05 + 0.9 * torch.rand(24, generator=generator)


@torch.no_grad()
def draw(ax, lambda1, lambda2):
    """Each vote as large as its share, and the pose."""
    points, a = some_votes()
    routing = routing_of(lambda1, lambda2)
    mu, _, c = routing(points.view(24, 1, 2, 1), a.log().view(24, 1, 1))
    dots = ax.scatter(*points.T, s=900 * c.flatten(), c=a, cmap="viridis", vmin=0, vmax=1,
                      alpha=0.85, linewidths=0)
    ax.scatter(*points.T, s=2, color="0.6")
    ax.plot(*mu.flatten(), "rx", markersize=9, markeredgewidth=2)
    ax.set(xticks=[], yticks=[], xlim=(-3.6, 2.6), ylim=(-3.4, 2.6), aspect="equal")
    return dots


def consensus():
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for ax, title, lambda1, lambda2 in zip(
            axes, ("equal shares\n$\\lambda_1 \\to \\infty$",
                   "consensus\n$\\lambda_1 = \\lambda_2 = 0.1$",
                   "shares by activation\n$\\lambda_2 \\to \\infty$"),
            (1e6, 0.1, 0.1), (0.1, 0.1, 1e6)):
        dots = draw(ax, lambda1, lambda2)
        ax.set_title(title)
    figure.colorbar(dots, ax=axes, label="activation of the input")
    save("consensus.png")


def mean_shift(routing, mu, votes, compatibility):
    """mu <- sum c_i g_i v_i / sum c_i g_i, with g_i = -dk/d(||mu - v_i||^2), for Eq. 15.

    In place of Eq. 4. It lowers `routing_objective` or leaves it, since k is convex in the squared
    distance (minorise-maximise). In logarithms: exact where all g_i underflow.
    """
    d2 = (votes - mu).square().sum(2).unsqueeze(-1)  # (I, O, N, Q)
    log_precision = -2 * routing.log_width
    log_g = (routing.kernel_logit + log_precision - 0.5 * d2 * log_precision.exp()).logsumexp(-1)
    return update_pose((compatibility.log() + log_g).softmax(0), votes)  # g up to a factor


@torch.no_grad()
def lambdas():
    """C and mu for a grid of the two lambdas, and the objective with both steps of mu."""
    points, a = some_votes()
    votes, log_a = points.view(24, 1, 2, 1), a.log().view(24, 1, 1)
    lambdas1, lambdas2 = (0.03, 0.1, 0.3, 3.0), (0.0, 0.1, 1.0)
    figure, axes = plt.subplots(3, 5, figsize=(10, 5.6), width_ratios=(1, 1, 1, 1, 1.5),
                                layout="constrained")
    for row, lambda2 in zip(axes, lambdas2):
        for ax, lambda1 in zip(row, lambdas1):
            dots = draw(ax, lambda1, lambda2)
            if lambda2 == lambdas2[0]:
                ax.set_title(f"$\\lambda_1$ = {lambda1:g}")
        row[0].set_ylabel(f"$\\lambda_2$ = {lambda2:g}")
        right, routing = row[-1], routing_of(0.1, lambda2)
        for label, style, step in (
                ("mean (Eq. 4)", "C0.-", lambda mu, c: update_pose(c, votes)),
                ("mean shift", "C1.--", lambda mu, c: mean_shift(routing, mu, votes, c))):
            mu, js = votes.mean(0), []
            for _ in range(8):
                c, _ = routing.compatibility(mu, votes, log_a, None, None)
                for mu in (mu, step(mu, c)):
                    k = routing.similarity(mu, votes)
                    lambda12 = routing.log_lambda.exp().unsqueeze(-1)
                    js.append(routing_objective(k, c, log_a, *lambda12).item())
            right.plot(torch.arange(1, len(js) + 1) / 2, js, style, label=label)
        right.set_ylabel("J (Eq. 2)")
    axes[0, -1].set_title("$\\lambda_1$ = 0.1: the objective")
    axes[0, -1].legend()
    axes[-1, -1].set_xlabel("iteration")
    figure.colorbar(dots, ax=axes[:, 3], label="activation of the input", shrink=0.7)
    save("lambdas.png")


def shares(layer, share, c, grid):
    """Of the poses of one layer (B, O, *out), what each capsule below, (B, C, *grid), has in them:
    its compatibility, summed over the outputs and positions that see it."""
    columns = (share.flatten(2).unsqueeze(-1) * c.flatten(2, -2)).sum(1).transpose(1, 2)
    return F.fold(columns, grid, layer.kernel_size, stride=layer.stride)


@torch.no_grad()
def look(name, weights):
    """Ten test images of a data set, labels and predictions, and log2 of what routing changes: the
    share of each primary capsule in the pose of the class found, over its share in mean votes."""
    _, test = data.load(name)
    net = CapsNet((1, 32, 32), 5)
    net.load_state_dict(torch.load(weights, weights_only=True)["model"])
    net.eval()
    generator, picked = torch.Generator().manual_seed(0), []
    for label in range(5):
        these = (test.labels == label).nonzero()[:, 0]
        picked += these[torch.randperm(len(these), generator=generator)[:2]].tolist()
    images = data.crops(data.standardise(test.images[picked]), 32)[0]
    primary = net.primary(net.conv(images))
    *hidden1, c1 = net.caps1(*primary)
    *hidden2, c2 = net.caps2(*hidden1)
    _, logit, c3 = net.class_caps(*hidden2)
    found = logit.flatten(1).argmax(1)
    share = mean = F.one_hot(found, 5).float()[..., None, None]
    for layer, c, below in ((net.class_caps, c3, hidden2), (net.caps2, c2, hidden1),
                            (net.caps1, c1, primary)):
        grid = below[1].shape[2:]
        share = shares(layer, share, c, grid)
        mean = shares(layer, mean, torch.full_like(c, 1 / c.shape[-1]), grid)
    ratio = (share.sum(1) / mean.sum(1)).log2()[:, :-1, :-1]  # nobody sees the 14th row and column
    return images[:, 0], test.labels[picked], found, ratio


def attention():
    figure, axes = plt.subplots(4, 10, figsize=(10, 4.4), layout="constrained")
    for name, rows in (("toys", axes[:2]), ("smallnorb", axes[2:])):
        classes = data.SPECS[name].classes
        for (top, bottom), image, truth, found, ratio in zip(rows.T, *look(name, RUNS[name])):
            for ax in (top, bottom):
                ax.imshow(image, cmap="gray")
                ax.set(xticks=[], yticks=[])
            top.set_title(classes[found], color="black" if truth == found else "red")
            map = bottom.imshow(ratio, cmap="PuOr_r", vmin=-2, vmax=2, alpha=0.6,
                                interpolation="bilinear", extent=(1, 27, 27, 1))
    bar = figure.colorbar(map, ax=axes, ticks=(-2, 0, 2), fraction=0.02, shrink=0.6)
    bar.ax.set_yticklabels(("1/4", "1", "4"))
    save("attention.png")


def curves():
    """Training error by epoch of the runs on smallNORB, and the test error that each ended with."""
    plt.figure(figsize=(6, 3.2), layout="constrained")
    for color, path in enumerate(sorted(HERE.parent.glob("smallnorb-*/result.json"))):
        folder, result = path.parent, json.loads(path.read_text())
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        epochs = [int(row["epoch"]) for row in rows]
        errors = [float(row["training_error"]) for row in rows]
        label = folder.name.removeprefix("smallnorb-").replace("-", " ")
        plt.semilogy(epochs, errors, ".-", color=f"C{color}", label=label)
        plt.semilogy(epochs[-1], result["test_error"], "*", color=f"C{color}", markersize=10)
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    plt.gca().set(xlabel="epoch", ylabel="training error, at the end test error (star), %",
                  xticks=(1, *range(5, 46, 5)), yticks=ticks, yticklabels=ticks)
    plt.minorticks_off()
    plt.gcf().legend(loc="outside right upper")
    save("curves.png")


if __name__ == "__main__":
    consensus()
    lambdas()
    curves()
    attention()
