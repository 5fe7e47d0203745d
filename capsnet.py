"""Capsule networks whose routing is learned: "Learning to compute inner consensus" (Faria, 2019).

One file, nothing but torch. Read it from top to bottom beside the paper, or copy it and write

    net = CapsNet(image_shape=(1, 32, 32), num_classes=5, routing="similarity")
    poses, logits = net(torch.randn(8, 1, 32, 32))   # (8, 5, 4, 4), (8, 5)

Glossary (EM paper: Hinton et al., ICLR 2018; dynamic paper: Sabour et al., NeurIPS 2017)

    code                  symbol      paper     what it is
    pose                  M_i, mu_j             what a capsule says about its part: a PxP matrix
    logit                                       of the activation: a = sigmoid(logit) is presence
    log_activation        log a_i               logsigmoid(logit), exact where a itself underflows
    weight                W_ij        Eq. 1     from input capsule i to output capsule j
    votes                 v_ij        Eq. 1     `compute_votes`
    compatibility         c_ij        Eq. 3     share of vote i in the pose of j; sums to 1 over i
    similarity            k(mu, v)    Eq. 15    `MeanRouting.similarity`, a mixture of Gaussians
    lambda1, lambda2                  Eq. 2     weights of the two penalties of `routing_objective`
    theta                 theta1..3   Eq. 13    of the activation
    phi, psi                          Alg. 2    the two small networks of `ConnectionistRouting`

Axes, the same letters everywhere

    B images            C input channels    O output channels       P side of a pose, D = P*P
    L output positions  I inputs of one receptive field (C channels x the kernel's cells)

Poses travel between layers as (B, C, *grid, P, P), activations as logits (B, C, *grid).

Deviations from the paper, and choices where it is silent

    * Activations are kept as logits, so that log a is exact and nothing takes the log of zero.
    * Poses of primary capsules have Frobenius norm 1, and the coordinates of a capsule's position
      are added to its pose before it votes, as in the author's code; the paper says neither.
    * lambda1, lambda2 and the kernel widths are learned as logarithms, which keeps them positive.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TINY = 1e-12  # below any squared length that carries information, far above underflow


# ----------------------------------------------------------------------------- the equations


def compute_votes(pose: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1: v_ij = (W_ij / ||W_ij||_F) M_i.

    pose (..., I, P, P), weight (I, O, P, P) -> votes (..., O, I, P*P). Finite at weight = 0.
    """
    weight = F.normalize(weight.flatten(-2), dim=-1, eps=1e-6).view_as(weight)
    return torch.einsum("iopq,...iqr->...oipr", weight, pose).flatten(-2)


def update_compatibility(similarity: Tensor, log_activation: Tensor, lambda1, lambda2) -> Tensor:
    """Eq. 11: the compatibilities C that minimise `routing_objective` for a fixed pose.

    similarity (..., I), log_activation (..., I), lambdas broadcastable -> (..., I).
    Softmax over the last axis, the *input* capsules: each output capsule distributes its own
    attention. (EM and dynamic routing normalise over the outputs instead.)
    """
    return ((similarity + lambda2 * log_activation) / (lambda1 + lambda2)).softmax(-1)


def update_pose(compatibility: Tensor, votes: Tensor) -> Tensor:
    """Eq. 4: mu = sum_i c_i v_i. (..., I), (..., I, D) -> (..., D).

    The minimiser of `routing_objective` for the kernel -||mu - v||^2. For other kernels it may
    raise the objective; the step that never does is `mean_shift_compatibility` before this one.
    """
    return torch.einsum("...i,...id->...d", compatibility, votes)


def mean_shift_compatibility(compatibility: Tensor, log_slope: Tensor) -> Tensor:
    """Weights c_i g_i / sum_l c_l g_l of one mean-shift step, g_i = -dk/d(||mu - v_i||^2).

    compatibility (..., I), log_slope = log g (..., I) -> (..., I). Where k is convex in the squared
    distance, as a mixture of Gaussians is, mu = sum_i of these weights times v_i never raises
    `routing_objective` (minorise-maximise). In logarithms, since every g_i may underflow.
    """
    return (log_slope + compatibility.clamp_min(torch.finfo(compatibility.dtype).tiny).log()).softmax(-1)


def routing_objective(similarity, compatibility, log_activation, lambda1, lambda2) -> Tensor:
    """Eq. 2: J = - sum c k + lambda1 sum c log(c N) + lambda2 sum c log(c / a). (..., I) -> (...)."""
    c, n = compatibility, compatibility.shape[-1]
    log_c = c.clamp_min(torch.finfo(c.dtype).tiny).log()  # c log c -> 0 as c -> 0
    penalty = lambda1 * (log_c + math.log(n)) + lambda2 * (log_c - log_activation)
    return (c * (penalty - similarity)).sum(-1)


def squared_distance(pose: Tensor, votes: Tensor) -> Tensor:
    """||mu - v_i||^2. (..., D), (..., I, D) -> (..., I).

    As ||v||^2 - 2 mu.v + ||mu||^2, which compiles to half the passes over the votes that the square
    of the difference takes; off by a few units of rounding of ||v||^2, which Eq. 1 keeps near 1.
    """
    dot = (votes * pose.unsqueeze(-2)).sum(-1)
    norms = votes.square().sum(-1) + pose.square().sum(-1, keepdim=True)
    return (norms - 2 * dot).clamp_min(0)


class ReceptiveFields(NamedTuple):
    """children (L, I): which input capsule each output position sees in each slot, as an index
    into the (channel, *grid) of the input, flattened to num_inputs."""

    children: Tensor
    num_inputs: int


def log_softmax_over_parents(logits: Tensor, fields: ReceptiveFields | None) -> Tensor:
    """Normalise over *all* parents of each child: (..., L, O, I) -> (..., L, O, I).

    Where receptive fields overlap, the parents of a child are the O channels at each position that
    sees it. Without `fields` no two positions share a child, and (..., O, I) is enough.
    """
    if fields is None:
        return logits.log_softmax(-2)
    here = logits.logsumexp(-2).flatten(-2)  # (..., L*I): over the channels of one position
    index = fields.children.flatten()
    top = here.new_full((*here.shape[:-1], fields.num_inputs), -math.inf)
    top = top.scatter_reduce(-1, index.expand_as(here), here.detach(), "amax")
    total = torch.zeros_like(top).index_add(-1, index, (here - top[..., index]).exp())
    norm = total.log()[..., index] + top[..., index]  # log of the sum over all parents, per slot
    return logits - norm.unflatten(-1, fields.children.shape).unsqueeze(-2)


# ------------------------------------------------------------------ Algorithm 1 and its instances


class Routing(nn.Module):
    """Algorithm 1: alternate between compatibilities and poses, then decide on the activations.

    A routing procedure is a subclass that defines `compatibility` and `activation` (and, where its
    pose is not the plain weighted sum, `pose`); `state` is whatever it carries across iterations.

    forward(votes (..., O, I, D), log_activation (..., I)) -> pose (..., O, D), logit (..., O)
    Leading dimensions are free; with `fields`, the last of them is L, the output positions.
    return_routing=True adds one tensor (..., O, ...) for each name in `reports`.
    iterations=0 leaves the mean vote.

        routing = SimilarityRouting(out_channels=16)
        pose, logit = routing(torch.randn(2, 16, 72, 16), torch.randn(2, 72))  # (2, 16, 16), (2, 16)
    """

    reports = ("compatibility",)

    def __init__(self, iterations: int = 3):
        super().__init__()
        self.iterations = iterations

    def forward(self, votes, log_activation, fields=None, return_routing=False):
        log_a = log_activation.unsqueeze(-2)  # (..., 1, I): all outputs see the same inputs
        c = torch.full_like(votes[..., 0], 1 / votes.shape[-2])  # (..., O, I)
        mu, state = update_pose(c, votes), None
        for _ in range(self.iterations):
            c, state = self.compatibility(mu, votes, log_a, c, state, fields)
            mu = self.pose(mu, votes, c)
        logit = self.activation(mu, votes, log_a, c, state)
        if not return_routing:
            return mu, logit
        return mu, logit, c, *self.report(mu, votes, log_a, c)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        """(..., O, D), (..., O, I, D), (..., 1, I), (..., O, I) -> c (..., O, I), state."""
        raise NotImplementedError

    def pose(self, mu, votes, c):
        return update_pose(c, votes)

    def activation(self, mu, votes, log_a, c, state):
        """The same shapes -> logit (..., O)."""
        raise NotImplementedError

    def report(self, mu, votes, log_a, c) -> tuple:
        """What `reports` names after the compatibilities."""
        return ()


class MeanRouting(Routing):
    """No routing: the mean vote, with the activation of Eq. 13. The baseline to beat.

    out_channels O; num_kernels Q Gaussians (Eq. 15), widths spread geometrically over `widths`.
    """

    def __init__(self, out_channels: int, iterations=0, num_kernels=4, widths=(0.1, 1.0)):
        super().__init__(iterations)
        low, high = (math.log(w) for w in widths)
        self.log_width = nn.Parameter(torch.linspace(low, high, num_kernels))
        self.kernel_logit = nn.Parameter(torch.zeros(num_kernels))
        self.theta = nn.Parameter(torch.tensor([[1.0], [0.0], [1.0]]).repeat(1, out_channels))

    def log_kernels(self, mu, votes) -> Tensor:
        """log w_q - ||mu - v_i||^2 / (2 sigma_q^2): (..., O, I, Q)."""
        d2 = squared_distance(mu, votes).unsqueeze(-1)
        return self.kernel_logit.log_softmax(0) - 0.5 * d2 * (-2 * self.log_width).exp()

    def similarity(self, mu, votes) -> Tensor:
        """Eq. 15: k(mu, v_i) = sum_q w_q exp(-||mu - v_i||^2 / (2 sigma_q^2)), in (0, 1]."""
        return self.log_kernels(mu, votes).exp().sum(-1)

    def activation(self, mu, votes, log_a, c, state):
        """Eq. 13: theta1 sum_i c_i k_i + theta2 + |theta3| sum_i c_i log a_i."""
        agreement = (c * self.similarity(mu, votes)).sum(-1)
        evidence = (c * log_a).sum(-1)
        return self.theta[0] * agreement + self.theta[1] + self.theta[2].abs() * evidence


class SimilarityRouting(MeanRouting):
    """Section 4.1: routing descends on the learned objective of Eq. 2.

    lambda1, lambda2: initial values, then learned per output channel. mean_shift=True takes the
    pose step that provably never raises the objective in place of the paper's mean.
    """

    reports = ("compatibility", "objective")

    def __init__(self, out_channels, iterations=3, num_kernels=4, widths=(0.1, 1.0),
                 lambda1=12.0, lambda2=1.0, mean_shift=False):
        super().__init__(out_channels, iterations, num_kernels, widths)
        initial = torch.tensor([[lambda1], [lambda2]]).log()
        self.log_lambda = nn.Parameter(initial.repeat(1, out_channels))
        self.mean_shift = mean_shift

    def lambdas(self):
        return self.log_lambda.exp().unsqueeze(-1)  # (2, O, 1)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        return update_compatibility(self.similarity(mu, votes), log_a, *self.lambdas()), None

    def pose(self, mu, votes, c):
        if self.mean_shift:
            log_slope = (self.log_kernels(mu, votes) - 2 * self.log_width).logsumexp(-1)
            c = mean_shift_compatibility(c, log_slope)
        return update_pose(c, votes)

    def report(self, mu, votes, log_a, c):
        return (routing_objective(self.similarity(mu, votes), c, log_a, *self.lambdas()),)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them: mlp(16, 32, 1)."""
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ConnectionistRouting(Routing):
    """Section 4.2, Algorithm 2: one LSTM cell reads every vote, iteration after iteration.

    [mu_j, v_ij, a_i, c_ij] -> cell -> phi -> c = softmax_i;  in the end logit a_j = psi(sum c s).
    hidden_size: of the cell; phi, psi: sizes of the hidden layers (Table 2).
    """

    def __init__(self, pose_entries: int = 16, iterations=3, hidden_size=16, phi=(), psi=()):
        super().__init__(iterations)
        self.cell = nn.LSTMCell(2 * pose_entries + 2, hidden_size)
        self.phi = mlp(hidden_size, *phi, 1)
        self.psi = mlp(hidden_size, *psi, 1)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        cell, d = self.cell, mu.shape[-1]
        w_mu, w_v, w_a, w_c = cell.weight_ih.split((d, d, 1, 1), dim=1)
        # The cell on [mu, v, a, c], term by term: what votes and activations contribute never
        # changes, mu's share is one vector per output, and in the first iteration h = s = 0.
        if state is None:
            a = log_a.exp().unsqueeze(-1)
            constant = F.linear(votes, w_v, cell.bias_ih + cell.bias_hh) + a * w_a.mT
            h, s = None, 0.0
        else:
            constant, h, s = state
        gates = constant + F.linear(mu, w_mu).unsqueeze(-2) + c.unsqueeze(-1) * w_c.mT
        if h is not None:
            gates = gates + F.linear(h, cell.weight_hh)  # (..., O, I, 4*hidden)
        i, f, g, o = gates.chunk(4, -1)
        s = f.sigmoid() * s + i.sigmoid() * g.tanh()
        h = o.sigmoid() * s.tanh()
        return self.phi(h).flatten(-2).softmax(-1), (constant, h, s)

    def activation(self, mu, votes, log_a, c, state):
        """Eq. 14. With iterations=0 no cell state exists yet: psi(0)."""
        s = c.new_zeros(*c.shape, self.cell.hidden_size) if state is None else state[2]
        return self.psi(update_pose(c, s)).flatten(-2)


class EMRouting(Routing):
    """EM routing (EM paper): a mixture of Gaussians whose components are the output capsules.

    r_ij = R_ij a_i weighs vote i in the mean and variance of j, and c = r / sum_i r, so that
    Algorithm 1's pose is the M-step; R_ij is normalised over all parents j of child i.
    lambda_scale: the activations' inverse temperature is lambda_scale (1 - 0.95^(t+1)).
    """

    def __init__(self, out_channels: int, iterations=3, lambda_scale=0.01):
        super().__init__(iterations)
        self.lambda_scale = lambda_scale
        self.beta_u = nn.Parameter(torch.zeros(out_channels))
        self.beta_a = nn.Parameter(torch.zeros(out_channels))

    def m_step(self, mu, votes, c, mass, t):
        """-> (variance (..., O, D), logit (..., O)); mass = sum_i r_ij, t counts from 0."""
        variance = torch.einsum("...i,...id->...d", c, (votes - mu.unsqueeze(-2)).square()) + 1e-5
        cost = (self.beta_u.unsqueeze(-1) + 0.5 * variance.log()).sum(-1) * mass
        return variance, self.lambda_scale * (1 - 0.95 ** (t + 1)) * (self.beta_a - cost)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        if state is None:
            t, logits = 0, torch.zeros_like(c)  # R_ij = 1 / number of parents of i
        else:
            t, mass = state
            variance, logit = self.m_step(mu, votes, c, mass, t - 1)
            # log a_j p_ij; (2 pi)^(D/2) is the same for all parents
            mahalanobis = ((votes - mu.unsqueeze(-2)).square() / variance.unsqueeze(-2)).sum(-1)
            log_norm = F.logsigmoid(logit) - 0.5 * variance.log().sum(-1)
            logits = log_norm.unsqueeze(-1) - 0.5 * mahalanobis
        log_r = log_softmax_over_parents(logits, fields) + log_a
        return log_r.softmax(-1), (t + 1, log_r.logsumexp(-1).exp())

    def activation(self, mu, votes, log_a, c, state):
        t, mass = (1, log_a.exp().sum(-1)) if state is None else state
        return self.m_step(mu, votes, c, mass, t - 1)[1]


class DynamicRouting(Routing):
    """Dynamic routing (dynamic paper): c_ij = softmax of b_ij over all parents j of child i.

    The pose is squash(s), s = sum_i c_ij v_ij; its length is the activation, which therefore is
    read from the poses of the inputs, not from log_activation.
    """

    def compatibility(self, mu, votes, log_a, c, state, fields):
        b = torch.zeros_like(c) if state is None else state + torch.einsum("...id,...d->...i", votes, mu)
        return log_softmax_over_parents(b, fields).exp(), b

    def pose(self, mu, votes, c):
        s = update_pose(c, votes)
        n2 = s.square().sum(-1, keepdim=True)
        return s * (n2 + TINY).sqrt() / (1 + n2)  # squash(s) = ||s||^2 / (1 + ||s||^2) s / ||s||

    def activation(self, mu, votes, log_a, c, state):
        """||squash(s)|| = n2 / (1 + n2) with n2 = ||s||^2, so its logit is log n2."""
        return (update_pose(c, votes).square().sum(-1) + TINY).log()


# --------------------------------------------------------------------------------- the layers

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def output_grid(grid, kernel_size, stride) -> tuple[int, ...]:
    """The grid that a convolution without padding leaves. ValueError if the kernel does not fit."""
    if any(n < k for n, k in zip(grid, kernel_size, strict=True)):
        raise ValueError(f"a grid of {tuple(grid)} is too small for a kernel of {kernel_size}")
    return tuple((n - k) // s + 1 for n, k, s in zip(grid, kernel_size, stride))


def receptive_fields(channels, grid, kernel_size, stride, device=None) -> ReceptiveFields:
    """Which input capsules each output position of such a convolution sees."""
    index = torch.arange(channels * math.prod(grid), device=device).view(channels, *grid)
    for axis, (k, s) in enumerate(zip(kernel_size, stride), start=1):
        index = index.unfold(axis, k, s)  # (C, *out, *kernel)
    index = index.movedim(0, len(grid)).flatten(len(grid)).flatten(0, -2)  # (L, I)
    return ReceptiveFields(index, channels * math.prod(grid))


def add_coordinates(pose: Tensor) -> Tensor:
    """Add (index + 0.5) / size along each spatial axis to the first entries of each pose.

    pose (B, C, *grid, P, P) -> the same shape.
    """
    *grid, side, _ = pose.shape[2:]
    axes = [(torch.arange(n, device=pose.device, dtype=pose.dtype) + 0.5) / n for n in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (*grid, len(grid))
    return pose + F.pad(position, (0, side * side - len(grid))).unflatten(-1, (side, side))


class PrimaryCaps(nn.Module):
    """Features to capsules: (B, channels, *grid) -> pose (B, C, *grid, P, P), logit (B, C, *grid).

    Poses have Frobenius norm 1. With activation_as_length=True they have norm a instead, which is
    where dynamic routing looks for it.
    """

    def __init__(self, in_channels, out_channels, pose_size=4, kernel_size=1, stride=1,
                 spatial_dims=2, activation_as_length=False):
        super().__init__()
        self.shape = (out_channels, pose_size, pose_size)
        conv = CONV[spatial_dims]
        self.pose = conv(in_channels, math.prod(self.shape), kernel_size, stride)
        self.logit = conv(in_channels, out_channels, kernel_size, stride)
        self.activation_as_length = activation_as_length

    def forward(self, features):
        logit = self.logit(features)
        pose = self.pose(features).unflatten(1, self.shape).movedim((2, 3), (-2, -1))
        pose = pose * (pose.square().sum((-2, -1), keepdim=True) + TINY).rsqrt()
        if self.activation_as_length:
            pose = pose * logit.sigmoid()[..., None, None]
        return pose, logit


class ConvCaps(nn.Module):
    """Convolutional capsules in 1, 2 or 3 dimensions, routed by `routing`.

    pose (B, C, *grid, P, P), logit (B, C, *grid) -> pose (B, O, *out, P, P), logit (B, O, *out)
    With return_routing=True also what the routing reports, such as {"compatibility":
    (B, O, *out, I)}, the inputs I channel by channel, each with its kernel's cells in row-major
    order. ValueError if the grid or the number of channels does not fit.

    kernel_size, stride: a number, or one per spatial dimension.
    coordinates: add each input's position to its pose before it votes.
    max_votes: how many entries of the votes to hold at a time. A larger batch is routed in chunks
        of whole images, which backward computes again: memory stays bounded at any batch size.

        layer = ConvCaps(8, 16, kernel_size=3, stride=2, routing=SimilarityRouting(16))
        pose, logit = layer(torch.randn(2, 8, 14, 14, 4, 4), torch.randn(2, 8, 14, 14))
        # (2, 16, 6, 6, 4, 4), (2, 16, 6, 6)
    """

    def __init__(self, in_channels, out_channels, kernel_size, routing: Routing, stride=1,
                 pose_size=4, spatial_dims=2, coordinates=True, max_votes=None):
        super().__init__()
        self.kernel_size = (kernel_size,) * spatial_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride = (stride,) * spatial_dims if isinstance(stride, int) else tuple(stride)
        self.coordinates, self.max_votes = coordinates, max_votes
        inputs = in_channels * math.prod(self.kernel_size)
        noise = torch.empty(inputs, out_channels, pose_size, pose_size).uniform_(-0.1, 0.1)
        self.weight = nn.Parameter(torch.eye(pose_size) + noise)  # near the identity: author's code
        self.routing = routing

    def forward(self, pose, logit, return_routing=False):
        channels, *grid = logit.shape[1:]
        if channels * math.prod(self.kernel_size) != self.weight.shape[0]:
            expected = self.weight.shape[0] // math.prod(self.kernel_size)
            raise ValueError(f"the input has {channels} capsule channels, expected {expected}")
        out = output_grid(grid, self.kernel_size, self.stride)
        fields = receptive_fields(channels, grid, self.kernel_size, self.stride, logit.device)
        if self.coordinates:
            pose = add_coordinates(pose)
        pose = pose.flatten(1, -3)[:, fields.children]  # (B, L, I, P, P)
        log_a = F.logsigmoid(logit).flatten(1)[:, fields.children]  # (B, L, I)

        votes_per_image = fields.children.shape[0] * self.weight.numel()
        images = max(1, (self.max_votes or math.inf) // votes_per_image)
        if images >= len(pose):
            results = self.route(pose, log_a, fields, return_routing)
        else:
            chunks = [checkpoint(self.route, p, a, fields, return_routing, use_reentrant=False,
                                 preserve_rng_state=False)
                      for p, a in zip(pose.split(images), log_a.split(images))]
            results = [torch.cat(parts) for parts in zip(*chunks)]
        mu, logit, *report = (x.transpose(1, 2).unflatten(2, out) for x in results)  # (B, O, *out, ...)
        mu = mu.unflatten(-1, pose.shape[-2:])
        return (mu, logit, dict(zip(self.routing.reports, report))) if return_routing else (mu, logit)

    def route(self, pose, log_a, fields, return_routing=False):
        """Votes and routing of whole images: (B, L, I, P, P), (B, L, I) -> (B, L, O, D), (B, L, O)."""
        votes = compute_votes(pose, self.weight)  # (B, L, O, I, D)
        kind = votes.device.type
        if torch.is_autocast_enabled(kind):  # the routing itself needs more than bfloat16's 8 bits
            votes, log_a = votes.float(), log_a.float()
        with torch.autocast(kind, enabled=False):
            return self.routing(votes, log_a, fields, return_routing)


# -------------------------------------------------------------------------------- the network


def make_routing(name, layer, out_channels, pose_size=4, **options) -> Routing:
    """The routing `name` of capsule layer 0, 1 or 2, sized as in the paper (Table 2, Eq. 15)."""
    num_kernels = (4, 4, 10)[layer]
    if name == "similarity":
        return SimilarityRouting(out_channels, num_kernels=num_kernels, **options)
    if name == "mean":
        return MeanRouting(out_channels, num_kernels=num_kernels, **options)
    if name == "connectionist":
        phi, psi = ((), (32, 32), (64, 64))[layer], ((), (64, 64), (124, 124))[layer]
        return ConnectionistRouting(pose_size**2, phi=phi, psi=psi, **options)
    if name == "em":
        return EMRouting(out_channels, **options)
    if name == "dynamic":
        return DynamicRouting(**options)
    raise ValueError(f"routing {name!r}: expected one of {', '.join(ROUTINGS)}")


ROUTINGS = ("similarity", "connectionist", "em", "dynamic", "mean")


class CapsNet(nn.Module):
    """Table 1: convolution, primary capsules, two layers of convolutional capsules, class capsules.

    image_shape: (channels, *spatial), one to three spatial dimensions of at least 17 each.
    channels: of the convolution and of the three capsule layers below the classes.
    routing: one of ROUTINGS; routing_options go to its three instances, iterations=3 for one.
    coordinates, max_votes: see `ConvCaps`.

    forward(images (B, *image_shape)) -> poses (B, num_classes, P, P), logits (B, num_classes);
    with return_routing=True also a list, the report of each of the three routed layers.
    ValueError if image_shape is too small for the kernels, or images have another shape.
    """

    def __init__(self, image_shape, num_classes, routing="similarity", channels=(64, 8, 16, 16),
                 pose_size=4, coordinates=True, max_votes=None, **routing_options):
        super().__init__()
        self.image_shape = tuple(image_shape)
        in_channels, *grid = self.image_shape
        dims = len(grid)
        try:
            for kernel, stride in ((5, 2), (3, 2), (3, 1)):
                grid = output_grid(grid, (kernel,) * dims, (stride,) * dims)
        except ValueError as error:
            raise ValueError(f"image_shape {self.image_shape}: {error}") from None
        features, primary, *widths = channels
        self.conv = nn.Sequential(CONV[dims](in_channels, features, kernel_size=5, stride=2),
                                  nn.ReLU(), BATCH_NORM[dims](features))
        self.primary = PrimaryCaps(features, primary, pose_size, spatial_dims=dims,
                                   activation_as_length=routing == "dynamic")
        widths = [primary, *widths, num_classes]
        kernels = (3, 3, grid)  # the class layer's kernel covers the grid
        self.caps = nn.ModuleList(
            ConvCaps(i, o, kernel, make_routing(routing, layer, o, pose_size, **routing_options),
                     stride, pose_size, dims, coordinates, max_votes)
            for layer, (i, o, kernel, stride) in enumerate(zip(widths, widths[1:], kernels, (2, 1, 1))))

    def forward(self, images, return_routing=False):
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images {tuple(images.shape)}: expected (B, {self.image_shape})")
        pose, logit = self.primary(self.conv(images))
        reports = []
        for layer in self.caps:
            pose, logit, *report = layer(pose, logit, return_routing)
            reports += report
        poses, logits = pose.flatten(1, -3), logit.flatten(1)  # the class grid is one position
        return (poses, logits, reports) if return_routing else (poses, logits)


def spread_loss(logits: Tensor, target: Tensor, margin: float) -> Tensor:
    """EM paper: sum over i != t of max(0, margin - (a_t - a_i))^2, mean over the batch.

    logits (B, classes), target (B,) int64; the EM paper raises the margin from 0.2 to 0.9.
    """
    a = logits.sigmoid()
    gap = (margin - (a.gather(1, target[:, None]) - a)).clamp_min(0).square()
    return (gap.sum(1) - margin**2).mean()  # the target's own term is margin^2
