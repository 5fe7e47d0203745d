"""Capsule networks whose routing is learned: "Learning to compute inner consensus" (Faria, 2019).

One file, nothing but torch. Read it beside the paper from top to bottom, or copy it and write

    net = CapsNet(image_shape=(1, 32, 32), num_classes=5, routing="similarity")
    poses, logits = net(torch.randn(8, 1, 32, 32))   # (8, 5, 4, 4), (8, 5)

Glossary (EM paper: Hinton et al., ICLR 2018; dynamic paper: Sabour et al., NeurIPS 2017)

    code              symbol      where    what it is
    pose              M_i, mu_j            what a capsule says about its part: a P x P matrix
    logit                                  of an activation: a = sigmoid(logit), "it is present"
    log_activation    log a_i              logsigmoid(logit): exact where a itself underflows
    weight            W_ij        Eq. 1    the view of output capsule j from input capsule i
    votes             v_ij        Eq. 1    what i predicts for the pose of j
    compatibility     c_ij        Eq. 3    share of vote i in the pose of j: sums to 1 over i
    similarity        k(mu, v)    Eq. 15   a mixture of Gaussians of the distance
    lambda1, lambda2              Eq. 2    weights of the two penalties of the objective
    theta             theta_1..3  Eq. 13   of the activation
    phi, psi                      Alg. 2   the two small networks of connectionist routing

Axes, the same letters everywhere

    B images   L output positions   I inputs of one receptive field (C channels x kernel cells)
    O output channels   P side of a pose, D = P * P entries

Between layers poses are (B, C, *grid, P, P) and activations are logits (B, C, *grid).

Where this departs from the paper, or chooses what the paper leaves open

    * Activations are logits throughout: log a is exact, and nothing takes the log of zero.
    * Primary poses have Frobenius norm 1, and each capsule's position is added to its pose before
      it votes, as in the author's code; the paper mentions neither.
    * lambda1, lambda2 and the kernel widths are learned as logarithms, so they stay positive.
    * The author starts at lambda1 = 12 and lambda2 = 1. There, and with theta_1 = 1, C is uniform
      and the class logits of all images are nearly equal: in 200 steps nothing was learned. The
      defaults here won short trials on held-out training toys (README).
    * Connectionist routing starts with larger weights than PyTorch's: with those, its class logits
      differ by 5e-5 between images, and 700 images later it had learned nothing.
    * Dynamic routing gets no coordinates: they would lengthen the poses, and length is presence.
      Its votes are longer by a constant gain: Eq. 1 alone lets poses fade from layer to layer.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TINY = 1e-12  # added to squared lengths before a root or a logarithm


# ---------------------------------------------------------------------------- the equations


def compute_votes(pose: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1: v_ij = (W_ij / ||W_ij||_F) M_i.

    pose (..., I, P, P), weight (I, O, P, P) -> votes (..., O, I, P*P). Finite at weight = 0.
    """
    weight = F.normalize(weight.flatten(-2), dim=-1, eps=1e-6).view_as(weight)
    # W M is linear in the flat M: its matrix is the Kronecker product of W and the identity. That
    # is 4 times the arithmetic, but longer rows to copy: with backward 1.3 times as fast for P = 4.
    identity = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    matrix = torch.einsum("iopq,rs->ioprqs", weight, identity).flatten(-2).flatten(-3, -2)
    return torch.einsum("iode,...ie->...oid", matrix, pose.flatten(-2)).contiguous()


def update_compatibility(similarity: Tensor, log_activation: Tensor, lambda1, lambda2) -> Tensor:
    """Eq. 11: the C that minimises `routing_objective` for fixed poses.

    similarity (..., I), log_activation (..., I) -> (..., I); the lambdas broadcast against these.
    Softmax over the last axis, the *input* capsules: every output capsule spreads one unit of
    attention over its votes. (EM and dynamic routing normalise over the outputs instead.)
    """
    scale = 1 / (lambda1 + lambda2)
    return (scale * similarity + scale * lambda2 * log_activation).softmax(-1)


def update_pose(compatibility: Tensor, votes: Tensor) -> Tensor:
    """Eq. 4: mu = sum_i c_i v_i. (..., I), (..., I, D) -> (..., D).

    Minimises `routing_objective` for fixed C if k = -||mu - v||^2; with other kernels it may raise
    it. The step that never does is the mean shift, see `SimilarityRouting`.
    """
    return torch.einsum("...i,...id->...d", compatibility, votes)


def routing_objective(similarity, compatibility, log_activation, lambda1, lambda2) -> Tensor:
    """Eq. 2: J = -sum c k + lambda1 sum c log(c N) + lambda2 sum c log(c / a).

    similarity, compatibility, log_activation (..., I) -> (...).
    """
    c, n = compatibility, compatibility.shape[-1]
    log_c = c.clamp_min(torch.finfo(c.dtype).tiny).log()  # so that c log c -> 0 as c -> 0
    penalty = lambda1 * (log_c + math.log(n)) + lambda2 * (log_c - log_activation)
    return (c * (penalty - similarity)).sum(-1)


def squared_distance(pose: Tensor, votes: Tensor) -> Tensor:
    """||mu - v_i||^2. (..., D), (..., I, D) -> (..., I).

    As ||v||^2 - 2 mu.v + ||mu||^2, which trains about twice as fast as squaring the difference once
    compiled. The error is a few roundings of ||v||^2, which Eq. 1 keeps near 1: harmless while the
    kernel's widths stay above a few hundredths.
    """
    dot = torch.einsum("...id,...d->...i", votes, pose)
    norms = votes.square().sum(-1) + pose.square().sum(-1, keepdim=True)
    return (norms - 2 * dot).clamp_min(0)


class ReceptiveFields(NamedTuple):
    """children (L, I): the input capsule in each slot of each output position's receptive field,
    as an index below num_inputs into the flattened (C, *grid)."""

    children: Tensor
    num_inputs: int


def log_softmax_over_parents(logits: Tensor, fields: ReceptiveFields | None) -> Tensor:
    """Normalise over *all* parents of each child. (..., L, O, I) -> (..., L, O, I).

    Where receptive fields overlap, a child's parents are the O channels of every position that
    sees it. Without `fields` no two positions share a child, and (..., O, I) will do.
    """
    if fields is None:
        return logits.log_softmax(-2)
    here = logits.logsumexp(-2).flatten(-2)  # (..., L*I): the parents at one position
    index = fields.children.flatten()
    top = here.new_full((*here.shape[:-1], fields.num_inputs), -math.inf)
    top = top.scatter_reduce(-1, index.expand_as(here), here.detach(), "amax")
    total = torch.zeros_like(top).index_add(-1, index, (here - top[..., index]).exp())
    norm = total.log()[..., index] + top[..., index]  # (..., L*I): the parents everywhere
    return logits - norm.unflatten(-1, fields.children.shape).unsqueeze(-2)


# ---------------------------------------------------------------- Algorithm 1 and its instances


class Routing(nn.Module):
    """Algorithm 1: alternate between compatibilities and poses, then decide on the activations.

    A routing procedure is a subclass that defines `compatibility` and `activation` (and `pose`,
    where that is not the weighted sum); `state` is whatever it carries from one to the next.

    forward(votes (..., O, I, D), log_activation (..., I)) -> pose (..., O, D), logit (..., O)
        fields: which input capsules these are, then the last leading dimension is L. Only EM and
            dynamic routing look at it: their positions compete for shared children.
        return_routing: append what `reports` names; compatibility is (..., O, I).
    iterations=0 is the mean vote.

        routing = SimilarityRouting(out_channels=16)
        pose, logit = routing(torch.randn(2, 16, 72, 9), torch.zeros(2, 72))  # (2, 16, 9), (2, 16)
    """

    reports = ("compatibility",)

    def __init__(self, iterations: int = 3):
        super().__init__()
        self.iterations = iterations

    def forward(self, votes, log_activation, fields=None, return_routing=False):
        log_a = log_activation.unsqueeze(-2)  # (..., 1, I): every output sees the same inputs
        c = torch.full_like(votes[..., 0], 1 / votes.shape[-2])  # (..., O, I)
        mu, state = update_pose(c, votes), None
        for _ in range(self.iterations):
            c, state = self.compatibility(mu, votes, log_a, c, state, fields)
            mu = self.pose(mu, votes, c)
        logit = self.activation(mu, votes, log_a, c, state)
        return (mu, logit, *self.report(mu, votes, log_a, c)) if return_routing else (mu, logit)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        """(..., O, D), (..., O, I, D), (..., 1, I), (..., O, I), state -> C (..., O, I), state."""
        raise NotImplementedError

    def pose(self, mu, votes, c):
        return update_pose(c, votes)

    def activation(self, mu, votes, log_a, c, state):
        """The same arguments -> logit (..., O)."""
        raise NotImplementedError

    def report(self, mu, votes, log_a, c):
        return (c,)


class MeanRouting(Routing):
    """No routing: the mean vote, with the activation of Eq. 13. The baseline to beat.

    num_kernels: Q of Eq. 15, shared by the channels; their widths start spread over `widths`.
    theta1: its initial value; logits need room, and k lies in (0, 1].
    """

    def __init__(self, out_channels, num_kernels=4, widths=(0.1, 1.0), theta1=20.0):
        super().__init__(iterations=0)
        low, high = widths
        self.log_width = nn.Parameter(torch.linspace(math.log(low), math.log(high), num_kernels))
        self.kernel_logit = nn.Parameter(torch.zeros(num_kernels))
        self.theta = nn.Parameter(torch.tensor([[theta1], [0.0], [1.0]]).repeat(1, out_channels))

    def log_kernels(self, mu, votes):
        """log(w_q) - ||mu - v_i||^2 / (2 sigma_q^2): (..., O, I, Q)."""
        d2 = squared_distance(mu, votes).unsqueeze(-1)
        return self.kernel_logit.log_softmax(0) - 0.5 * d2 * (-2 * self.log_width).exp()

    def similarity(self, mu, votes):
        """Eq. 15: k(mu, v_i) = sum_q w_q exp(-||mu - v_i||^2 / (2 sigma_q^2)), (..., O, I)."""
        d2, slopes = squared_distance(mu, votes), -0.5 * (-2 * self.log_width).exp()
        return sum(w * (b * d2).exp() for w, b in zip(self.kernel_logit.softmax(0), slopes))

    def activation(self, mu, votes, log_a, c, state):
        """Eq. 13: theta_1 sum_i c_i k_i + theta_2 + |theta_3| sum_i c_i log a_i."""
        agreement, evidence = (c * self.similarity(mu, votes)).sum(-1), (c * log_a).sum(-1)
        return self.theta[0] * agreement + self.theta[1] + self.theta[2].abs() * evidence


class SimilarityRouting(MeanRouting):
    """Section 4.1: routing descends on an objective (Eq. 2) whose parameters are learned.

    lambda1, lambda2: initial values, then one of each per output channel.
    mean_shift: the paper's pose, sum c_i v_i, may raise the objective. With mean_shift=True the
        pose is sum c_i g_i v_i / sum c_i g_i, g_i = -dk/d(||mu - v_i||^2), which never does (k is
        convex in the squared distance: minorise-maximise).
    """

    reports = ("compatibility", "objective")

    def __init__(self, out_channels, iterations=3, num_kernels=4, widths=(0.1, 1.0), theta1=20.0,
                 lambda1=0.2, lambda2=0.2, mean_shift=False):
        super().__init__(out_channels, num_kernels, widths, theta1)
        self.iterations = iterations
        lambdas = torch.tensor([[lambda1], [lambda2]], dtype=torch.get_default_dtype())
        self.log_lambda = nn.Parameter(lambdas.log().repeat(1, out_channels))
        self.mean_shift = mean_shift

    def lambdas(self):
        return self.log_lambda.exp().unsqueeze(-1)  # (2, O, 1)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        return update_compatibility(self.similarity(mu, votes), log_a, *self.lambdas()), None

    def pose(self, mu, votes, c):
        if self.mean_shift:  # c_i g_i in logarithms, since every g_i may underflow
            log_g = (self.log_kernels(mu, votes) - 2 * self.log_width).logsumexp(-1)
            c = (c.clamp_min(torch.finfo(c.dtype).tiny).log() + log_g).softmax(-1)
        return update_pose(c, votes)

    def report(self, mu, votes, log_a, c):
        return c, routing_objective(self.similarity(mu, votes), c, log_a, *self.lambdas())


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, that neither amplify nor fade their input at first."""
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    for linear in layers[::2]:
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers[:-1])


def tanh(x: Tensor) -> Tensor:
    """A third of the time of torch.tanh on a CPU; the error is up to a rounding of 1."""
    return 2 * (2 * x).sigmoid() - 1


class ConnectionistRouting(Routing):
    """Section 4.2, Algorithm 2: one LSTM cell reads all votes, iteration after iteration.

    h, s <- cell([mu_j, v_ij, a_i, c_ij], (h, s));  c <- softmax_i(phi(h));  at the end, Eq. 14,
    logit a_j = psi(sum_i c_i s_i). hidden_size: of the cell; phi, psi: hidden layers (Table 2).
    """

    def __init__(self, pose_entries=16, iterations=3, hidden_size=16, phi=(), psi=()):
        super().__init__(iterations)
        self.cell = nn.LSTMCell(2 * pose_entries + 2, hidden_size)
        with torch.no_grad():  # its initial weights expect entries near 1, poses have a norm near 1
            self.cell.weight_ih[:, : 2 * pose_entries] *= math.sqrt(pose_entries)
        self.phi = mlp(hidden_size, *phi, 1)
        self.psi = mlp(hidden_size, *psi, 1)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        # The cell, term by term: what v and a contribute to its gates is the same in every
        # iteration, mu is one vector per output capsule, and at the start h = s = 0.
        d = mu.shape[-1]
        w_mu, w_v, w_a, w_c = self.cell.weight_ih.split((d, d, 1, 1), dim=1)
        if state is None:
            bias = self.cell.bias_ih + self.cell.bias_hh
            constant = F.linear(votes, w_v, bias) + F.linear(log_a.exp().unsqueeze(-1), w_a)
            recurrent, s = 0, 0
        else:
            constant, h, s = state
            recurrent = F.linear(h, self.cell.weight_hh)
        variable = F.linear(mu, w_mu).unsqueeze(-2) + F.linear(c.unsqueeze(-1), w_c)
        i, f, g, o = (constant + variable + recurrent).chunk(4, -1)  # (..., O, I, hidden) each
        s = f.sigmoid() * s + i.sigmoid() * tanh(g)
        h = o.sigmoid() * tanh(s)
        return self.phi(h).flatten(-2).softmax(-1), (constant, h, s)

    def activation(self, mu, votes, log_a, c, state):
        s = c.new_zeros(*c.shape, self.cell.hidden_size) if state is None else state[2]
        return self.psi(update_pose(c, s)).flatten(-2)


class EMRouting(Routing):
    """EM routing (EM paper): votes cluster around Gaussians, one for each output capsule.

    r_ij = R_ij a_i is the weight of vote i in cluster j, and C = r / sum_i r, so that the pose of
    Algorithm 1 is the M-step's mean. R is normalised over all parents of a child.
    The activation's lambda is inverse_temperature * (1 - 0.95^(t+1)) in iteration t = 0, 1, ...
    """

    def __init__(self, out_channels, iterations=3, inverse_temperature=0.01):
        super().__init__(iterations)
        self.inverse_temperature = inverse_temperature
        self.beta_u = nn.Parameter(torch.zeros(out_channels))
        self.beta_a = nn.Parameter(torch.zeros(out_channels))

    def m_step(self, mu, votes, c, mass, t):
        """-> variance (..., O, D), logit (..., O). mass (..., O) = sum_i r_ij."""
        variance = torch.einsum("...i,...id->...d", c, (votes - mu.unsqueeze(-2)).square()) + 1e-5
        cost = (self.beta_u.unsqueeze(-1) + 0.5 * variance.log()).sum(-1) * mass
        return variance, self.inverse_temperature * (1 - 0.95 ** (t + 1)) * (self.beta_a - cost)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        if state is None:
            t, logits = 0, torch.zeros_like(c)  # R_ij = 1 / the number of parents of i
        else:  # E-step: log(a_j p_ij) without the factor of (2 pi)^(D/2) that all parents share
            t, mass = state
            variance, logit = self.m_step(mu, votes, c, mass, t - 1)
            distance = ((votes - mu.unsqueeze(-2)).square() / variance.unsqueeze(-2)).sum(-1)
            log_scale = F.logsigmoid(logit) - 0.5 * variance.log().sum(-1)
            logits = log_scale.unsqueeze(-1) - 0.5 * distance
        log_r = log_softmax_over_parents(logits, fields) + log_a
        return log_r.softmax(-1), (t + 1, log_r.logsumexp(-1).exp())

    def activation(self, mu, votes, log_a, c, state):
        t, mass = (1, log_a.exp().sum(-1)) if state is None else state
        return self.m_step(mu, votes, c, mass, t - 1)[1]


class DynamicRouting(Routing):
    """Dynamic routing (dynamic paper): c_ij = softmax of b_ij over all parents j of child i.

    The pose is squash(s_j), s_j = sum_i c_ij v_ij. Its length is the activation, so that of an
    input is in its vote already, and log_activation is not used.
    gain: multiplies the votes. Eq. 1 halves their length, and squash all but squares what is short:
        in `CapsNet` poses of 0.5 would become 0.03, then 0.001, layer by layer. It uses 10.
    """

    def __init__(self, iterations: int = 3, gain: float = 1.0):
        super().__init__(iterations)
        self.gain = gain

    def forward(self, votes, log_activation, fields=None, return_routing=False):
        return super().forward(self.gain * votes, log_activation, fields, return_routing)

    def compatibility(self, mu, votes, log_a, c, state, fields):
        agreement = torch.einsum("...id,...d->...i", votes, mu)
        b = torch.zeros_like(c) if state is None else state + agreement
        return log_softmax_over_parents(b, fields).exp(), b

    def pose(self, mu, votes, c):
        s = update_pose(c, votes)
        n2 = s.square().sum(-1, keepdim=True)
        return s * (n2 + TINY).sqrt() / (1 + n2)  # ||s||^2 / (1 + ||s||^2) in the direction of s

    def activation(self, mu, votes, log_a, c, state):
        """a = ||squash(s)|| = ||s||^2 / (1 + ||s||^2), so logit a = log ||s||^2."""
        return (update_pose(c, votes).square().sum(-1) + TINY).log()


# ------------------------------------------------------------------------------- the layers

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
    for axis, (k, s) in enumerate(zip(kernel_size, stride), 1):
        index = index.unfold(axis, k, s)  # in the end (C, *out, *kernel)
    index = index.movedim(0, len(grid)).flatten(len(grid)).flatten(0, -2)  # (L, I)
    return ReceptiveFields(index, channels * math.prod(grid))


def add_coordinates(pose: Tensor) -> Tensor:
    """Add (index + 0.5) / size along each axis of the grid to the first entries of every pose.

    (B, C, *grid, P, P) -> the same shape.
    """
    *grid, side, _ = pose.shape[2:]
    axes = [(torch.arange(n, device=pose.device, dtype=pose.dtype) + 0.5) / n for n in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (*grid, len(grid))
    return pose + F.pad(position, (0, side * side - len(grid))).unflatten(-1, (side, side))


class PrimaryCaps(nn.Module):
    """Features to capsules: (B, features, *grid) -> pose (B, C, *grid, P, P), logit (B, C, *grid).

    Poses have Frobenius norm 1, or, with activation_as_length=True, norm a: what dynamic routing
    expects of its inputs.
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
    """Convolutional capsules in 1, 2 or 3 dimensions, without padding.

    pose (B, C, *grid, P, P), logit (B, C, *grid) -> pose (B, O, *out, P, P), logit (B, O, *out)
    return_routing=True appends a dict of what the routing reports: "compatibility" is
    (B, O, *out, I), the inputs I channel by channel, in each the cells of the kernel row by row.
    ValueError if the grid is smaller than the kernel, or the number of channels is not in_channels.

    kernel_size, stride: a number, or one for each spatial dimension.
    coordinates: add each input's position to its pose before it votes.
    max_votes: about how many entries of the votes to route at a time, in chunks of whole images:
        on a CPU that is faster, as long as a chunk stays near the cache.
    recompute: hold no votes for backward, compute each chunk anew there: with max_votes, memory is
        bounded at any batch size, for 1.5 to 2 times the time.

        layer = ConvCaps(8, 16, kernel_size=3, stride=2, routing=SimilarityRouting(16))
        pose, logit = layer(torch.randn(2, 8, 14, 14, 4, 4), torch.randn(2, 8, 14, 14))
        # (2, 16, 6, 6, 4, 4), (2, 16, 6, 6)
    """

    def __init__(self, in_channels, out_channels, kernel_size, routing, stride=1, pose_size=4,
                 spatial_dims=2, coordinates=True, max_votes=None, recompute=False):
        super().__init__()
        self.kernel_size, self.stride = (
            (n,) * spatial_dims if isinstance(n, int) else tuple(n) for n in (kernel_size, stride))
        if len(self.kernel_size) != spatial_dims or len(self.stride) != spatial_dims:
            raise ValueError(f"kernel_size {self.kernel_size}, stride {self.stride}: "
                             f"expected {spatial_dims} numbers each, as many as spatial_dims")
        self.in_channels, self.coordinates = in_channels, coordinates
        self.max_votes, self.recompute = max_votes, recompute
        inputs = in_channels * math.prod(self.kernel_size)
        noise = torch.empty(inputs, out_channels, pose_size, pose_size).uniform_(-0.1, 0.1)
        self.weight = nn.Parameter(torch.eye(pose_size) + noise)  # the author's initial values
        self.routing = routing

    def forward(self, pose, logit, return_routing=False):
        channels, *grid = logit.shape[1:]
        if channels != self.in_channels:
            raise ValueError(f"{channels} channels of capsules, expected {self.in_channels}")
        out = output_grid(grid, self.kernel_size, self.stride)
        fields = receptive_fields(channels, grid, self.kernel_size, self.stride, logit.device)
        if self.coordinates:
            pose = add_coordinates(pose)
        pose = pose.flatten(1, -3)[:, fields.children]  # (B, L, I, P, P)
        log_a = F.logsigmoid(logit).flatten(1)[:, fields.children]  # (B, L, I)

        batches = [(pose, log_a)]
        if self.max_votes is not None:  # chunks of one size, so that a compiled routing is reused
            most = self.max_votes // (fields.children.shape[0] * self.weight.numel())
            size = next((n for n in range(min(most, len(pose)), 1, -1) if len(pose) % n == 0), 1)
            batches = zip(pose.split(size), log_a.split(size))
        route = self.route
        if self.recompute:
            route = partial(checkpoint, route, use_reentrant=False)
        chunks = [route(p, a, fields, return_routing) for p, a in batches]
        results = [torch.cat(parts) for parts in zip(*chunks)]
        mu, logit, *report = (x.transpose(1, 2).unflatten(2, out) for x in results)
        mu = mu.unflatten(-1, pose.shape[-2:])
        report = [dict(zip(self.routing.reports, report))] if return_routing else []
        return mu, logit, *report

    def route(self, pose, log_a, fields, return_routing=False):
        """Vote and route: (B, L, I, P, P), (B, L, I) -> (B, L, O, D), (B, L, O)."""
        votes = compute_votes(pose, self.weight)  # (B, L, O, I, D)
        device = votes.device.type
        if not torch.is_autocast_enabled(device):
            return self.routing(votes, log_a, fields, return_routing)
        with torch.autocast(device, enabled=False):  # consensus needs more than bfloat16's 8 bits
            return self.routing(votes.float(), log_a.float(), fields, return_routing)


# ------------------------------------------------------------------------------ the network

ROUTINGS = ("similarity", "connectionist", "em", "dynamic", "mean")


def make_routing(name, layer, out_channels, pose_size=4, **options) -> Routing:
    """The routing for capsule layer 0, 1 or 2, as the paper sizes it (Q of Eq. 15; Table 2)."""
    if name in ("similarity", "mean"):
        options = {"num_kernels": (4, 4, 10)[layer], "theta1": (20.0, 20.0, 60.0)[layer], **options}
        return (SimilarityRouting if name == "similarity" else MeanRouting)(out_channels, **options)
    if name == "connectionist":
        phi, psi = (((), ()), ((32, 32), (64, 64)), ((64, 64), (124, 124)))[layer]
        return ConnectionistRouting(pose_size**2, **{"phi": phi, "psi": psi, **options})
    if name == "em":
        return EMRouting(out_channels, **options)
    if name == "dynamic":
        return DynamicRouting(**{"gain": 10.0, **options})
    raise ValueError(f"routing {name!r}: expected one of {', '.join(ROUTINGS)}")


class CapsNet(nn.Module):
    """Table 1: a convolution, primary capsules, two convolutional capsule layers, class capsules.

    image_shape: (channels, *spatial), one to three spatial dimensions of 17 or more each.
    routing: one of ROUTINGS; routing_options go to the routing of all three layers: iterations=2.
    channels: of the convolution and of the three capsule layers below the classes.
    coordinates, max_votes, recompute: see `ConvCaps`.

    forward(images (B, *image_shape)) -> poses (B, num_classes, P, P), logits (B, num_classes)
    return_routing=True appends a list, the report of each routed layer (see `ConvCaps`).
    ValueError if image_shape is too small for the kernels, or the images have another shape.
    """

    def __init__(self, image_shape, num_classes, routing="similarity", channels=(64, 8, 16, 16),
                 pose_size=4, coordinates=True, max_votes=None, recompute=False,
                 **routing_options):
        super().__init__()
        self.image_shape = tuple(image_shape)
        in_channels, *grid = self.image_shape
        dims = len(grid)
        if dims not in CONV:
            raise ValueError(f"image_shape {self.image_shape}: expected (channels, *spatial), "
                             "one to three spatial dimensions")
        try:
            for kernel, stride in ((5, 2), (3, 2), (3, 1)):
                grid = output_grid(grid, (kernel,) * dims, (stride,) * dims)
        except ValueError as error:
            raise ValueError(f"image_shape {self.image_shape}: {error}") from None
        features, primary, *hidden = channels
        self.conv = nn.Sequential(CONV[dims](in_channels, features, kernel_size=5, stride=2),
                                  nn.ReLU(), BATCH_NORM[dims](features))
        self.primary = PrimaryCaps(features, primary, pose_size, spatial_dims=dims,
                                   activation_as_length=routing == "dynamic")
        if routing == "dynamic":  # a position would lengthen the poses, and length is presence
            coordinates = False
        widths, kernels, strides = (primary, *hidden, num_classes), (3, 3, grid), (2, 1, 1)
        self.caps = nn.ModuleList(  # the kernel of the class capsules covers the grid
            ConvCaps(widths[n], widths[n + 1], kernels[n],
                     make_routing(routing, n, widths[n + 1], pose_size, **routing_options),
                     strides[n], pose_size, dims, coordinates, max_votes, recompute)
            for n in range(3))

    def forward(self, images, return_routing=False):
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images of {tuple(images.shape)}, expected (B, *{self.image_shape})")
        pose, logit = self.primary(self.conv(images))
        reports = []
        for layer in self.caps:
            pose, logit, *report = layer(pose, logit, return_routing)
            reports += report
        outputs = pose.flatten(1, -3), logit.flatten(1)  # the classes' grid is a single cell
        return (*outputs, reports) if return_routing else outputs


def spread_loss(logits: Tensor, target: Tensor, margin: float) -> Tensor:
    """EM paper: sum over i != t of max(0, margin - (a_t - a_i))^2, then the mean over the batch.

    logits (B, classes), target (B,) int64. The EM paper raises the margin from 0.2 to 0.9.
    """
    a = logits.sigmoid()
    shortfall = (margin - (a.gather(1, target[:, None]) - a)).clamp_min(0).square()
    return (shortfall.sum(1) - margin**2).mean()  # less the target's own term
