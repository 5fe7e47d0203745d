"""Capsule networks whose routing is learned: "Learning to compute inner consensus" (Faria, 2019).

One file, nothing but torch. Read it beside the paper from top to bottom, or copy it and write

    net = CapsNet(image_shape=(1, 32, 32), num_classes=5, routing="similarity")
    poses, logits = net(torch.randn(8, 1, 32, 32))   # (8, 5, 4, 4), (8, 5)

Glossary (EM paper: Hinton et al., ICLR 2018; dynamic paper: Sabour et al., NeurIPS 2017)

    code              symbol      where    what it is
    pose, mu          M_i, mu_j            what a capsule says about its part: a P x P matrix
    logit                                  of an activation: a = sigmoid(logit), "it is present"
    log_a             log a_i              logsigmoid(logit): exact where a itself underflows
    weight            W_ij        Eq. 1    takes the pose of input i to its vote for j
    votes             v_ij        Eq. 1    what i predicts for the pose of j
    compatibility, c  c_ij        Eq. 3    share of vote i in the pose of j: sums to 1 over i
                                           (dynamic routing's: over all parents j)
    similarity, k     k(mu, v)    Eq. 15   a mixture of Gaussians of the distance
    lambda1, lambda2              Eq. 2    weights of the two penalties of the objective
    theta             theta_1..3  Eq. 13   of the activation
    phi, psi           Alg. 2, Eq. 14      the two small networks of connectionist routing

Axes, the same letters everywhere

    B images   L output positions   I inputs of one receptive field (C channels x kernel cells)
    O output channels   P side of a pose, D = P * P entries

Between layers poses are (B, C, *grid, P, P), activations (B, C, *grid).

Where this departs from the paper, or chooses what the paper leaves open

    * Activations are logits throughout: log a is exact, and nothing takes the log of zero.
    * Before it votes, every pose is divided by its Frobenius norm, as in the author's early
      versions; his later ones do it with primary poses only. Without it, votes shrink by half in
      every layer. In dynamic routing length is presence: there poses get the length a.
    * No coordinates are added to poses. The author adds three: the output position's, and one of
      the slot in its field. Without any, similarity routing recognised new toys better.
    * lambda1, lambda2 and the kernel widths are learned as logarithms, so they stay positive (and
      weight decay would pull them towards 1).
    * lambda1 and lambda2 start at 0.2, theta_1 at 20, in the class capsules 60. At the author's 12,
      1 and a small theta_1 c stays uniform and the class logits of all images nearly equal.
      theta_2 starts at 0, theta_3 at 1; primary activations near 1/2 (the author's near 0.7).
    * No ReLU on the primary poses, which some of the author's versions have.
    * Connectionist routing starts with larger weights than PyTorch's, with which its class logits
      hardly differ between images.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------- votes, and Algorithm 1


def compute_votes(pose: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1: v_ij = (W_ij / ||W_ij||_F) M_i.

    pose (..., I, P, P), weight (I, O, P, P) -> votes (..., O, I, D). Finite, with its gradient, at
    weight = 0.
    """
    weight = F.normalize(weight, dim=(-2, -1), eps=1e-6)
    return torch.einsum("iopq,...iqr->...oipr", weight, pose).flatten(-2)


def update_pose(compatibility: Tensor, votes: Tensor) -> Tensor:
    """Eq. 4: mu = sum_i c_i v_i. (..., I), (..., I, D) -> (..., D)."""
    return torch.einsum("...i,...id->...d", compatibility, votes)


class Routing(nn.Module):
    """Algorithm 1: alternate between compatibilities and poses, then decide on the activations.

    A routing procedure is a subclass that defines `compatibility` and `activation`, and where it
    needs to `initial_state` and `pose`; `state` is what it carries from one call to the next, S in
    the paper. `CapsNet` finds it in ROUTINGS and constructs it as (out_channels, pose_size,
    **options).

    forward(votes (..., O, I, D), log_a (..., I)) -> pose (..., O, D), logit (..., O), c (..., O, I)
        log_a is finite: an absent input has one of -1e8, say, not -inf. In EM routing it then has
        no influence, in similarity routing on the first pose only, the uniform mean.
        fields: (children (L, I), number of inputs): which input is in which slot; then the last
            leading dimension is L. Only EM and dynamic routing, whose output positions compete for
            the inputs that they share, look at it.
    iterations=0 is the mean vote, in dynamic routing not squashed; the logits of EM and
        connectionist routing are then constant.

        routing = SimilarityRouting(out_channels=16)
        mu, logit, c = routing(torch.randn(2, 16, 72, 16), torch.zeros(2, 72))
        # (2, 16, 16), (2, 16), (2, 16, 72)
    """

    length_is_activation = False  # True: a pose's length is its activation

    def __init__(self, iterations):
        super().__init__()
        self.iterations = iterations

    def forward(self, votes, log_a, fields=None):
        log_a = log_a.unsqueeze(-2)  # (..., 1, I): every output sees the same inputs
        c = torch.full_like(votes[..., 0], 1 / votes.shape[-2])  # (..., O, I)
        state = self.initial_state(votes, fields)
        mu = update_pose(c, votes)  # (..., O, D)
        for _ in range(self.iterations):
            c, state = self.compatibility(mu, votes, log_a, c, state)
            mu = self.pose(mu, votes, c)
        return mu, self.activation(mu, votes, log_a, c, state), c

    def initial_state(self, votes, fields):
        return None

    def compatibility(self, mu, votes, log_a, c, state):
        """(..., O, D), (..., O, I, D), (..., 1, I), (..., O, I), S -> c (..., O, I), S."""
        raise NotImplementedError

    def pose(self, mu, votes, c):
        return update_pose(c, votes)

    def activation(self, mu, votes, log_a, c, state):
        """The same arguments -> logit (..., O)."""
        raise NotImplementedError


# ------------------------------------------------------------------- Section 4.1: similarity


def routing_objective(similarity, compatibility, log_a, lambda1, lambda2) -> Tensor:
    """Eq. 2: J = -sum c k + lambda1 sum c log(c N) + lambda2 sum c log(c / a).

    similarity, compatibility, log_a (..., I) -> (...). Alternating minimisation is the routing:
    over c by Eq. 11, over mu by Eq. 4, which is exact for k = -||mu - v||^2 (for others, see
    mean_shift in `SimilarityRouting`).
    """
    c, n = compatibility, compatibility.shape[-1]
    log_c = c.clamp_min(torch.finfo(c.dtype).tiny).log()  # so that c log c -> 0 as c -> 0
    penalty = lambda1 * (log_c + math.log(n)) + lambda2 * (log_c - log_a)
    return (c * (penalty - similarity)).sum(-1)


def update_compatibility(similarity: Tensor, log_a: Tensor, lambda1, lambda2) -> Tensor:
    """Eq. 11: the c that minimises `routing_objective` for fixed poses.

    similarity (..., I), log_a (..., I) -> (..., I); the lambdas broadcast against these.
    Softmax over the last axis, the *input* capsules: every output capsule spreads one unit of
    attention over its votes. (EM and dynamic routing share out an input over its parents instead.)
    """
    return ((similarity + lambda2 * log_a) / (lambda1 + lambda2)).softmax(-1)


def squared_distance(pose: Tensor, votes: Tensor) -> Tensor:
    """||mu - v_i||^2. (..., D), (..., I, D) -> (..., I)."""
    return (votes - pose.unsqueeze(-2)).square().sum(-1)


class SimilarityRouting(Routing):
    """Section 4.1: routing by alternation on an objective (Eq. 2) whose parameters are learned.

    num_kernels: Q of Eq. 15, shared by the channels; their widths start spread over `widths`, a
        single one at the first.
    lambda1, lambda2 (positive), theta1: initial values, then one of each per output channel. The
        gain theta_1 must be large, since logits need room and k lies in (0, 1].
    mean_shift: replaces the paper's pose, sum c_i v_i, by sum c_i g_i v_i / sum c_i g_i with
        g_i = -dk/d(||mu - v_i||^2), which never raises the objective (k is convex in the squared
        distance: minorise-maximise). c is then not the share in the pose. In logarithms: the ratio
        stays exact where all g_i underflow.
    """

    def __init__(self, out_channels, pose_size=4, iterations=3, num_kernels=4, widths=(0.1, 1.0),
                 lambda1=0.2, lambda2=0.2, theta1=20.0, mean_shift=False):
        super().__init__(iterations)
        lambdas, theta = torch.tensor([lambda1, lambda2]), torch.tensor([theta1, 0.0, 1.0])
        self.log_lambda = nn.Parameter(lambdas.log()[:, None].repeat(1, out_channels))
        self.theta = nn.Parameter(theta[:, None].repeat(1, out_channels))
        self.kernel_logit = nn.Parameter(torch.zeros(num_kernels))
        self.log_width = nn.Parameter(torch.linspace(*map(math.log, widths), num_kernels))
        self.mean_shift = mean_shift

    def similarity(self, mu, votes):
        """Eq. 15: k(mu, v_i) = sum_q w_q exp(-||mu - v_i||^2 / (2 sigma_q^2)), (..., O, I)."""
        d2, sigma = squared_distance(mu, votes), self.log_width.exp()
        weights = self.kernel_logit.softmax(0)
        return sum(w * (-d2 / (2 * s**2)).exp() for w, s in zip(weights, sigma))

    def lambdas(self):
        return self.log_lambda.exp().unsqueeze(-1)  # (2, O, 1)

    def compatibility(self, mu, votes, log_a, c, state):
        return update_compatibility(self.similarity(mu, votes), log_a, *self.lambdas()), state

    def pose(self, mu, votes, c):
        if self.mean_shift:
            d2 = squared_distance(mu, votes).unsqueeze(-1)
            log_w = self.kernel_logit.log_softmax(0) - 2 * self.log_width
            log_g = (log_w - 0.5 * d2 * (-2 * self.log_width).exp()).logsumexp(-1)
            log_c = c.clamp_min(torch.finfo(c.dtype).tiny).log().masked_fill(c == 0, -math.inf)
            c = (log_c + log_g).softmax(-1)
        return update_pose(c, votes)

    def activation(self, mu, votes, log_a, c, state):
        """Eq. 13: logit a = theta_1 sum_i c_i k_i + theta_2 + |theta_3| sum_i c_i log a_i."""
        agreement, evidence = (c * self.similarity(mu, votes)).sum(-1), (c * log_a).sum(-1)
        return self.theta[0] * agreement + self.theta[1] + self.theta[2].abs() * evidence


# --------------------------------------------------------------- Section 4.2: connectionist


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, in He initialisation."""
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    for linear in layers[::2]:
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers[:-1])


class ConnectionistRouting(Routing):
    """Section 4.2, Algorithm 2: one LSTM cell reads all votes, iteration after iteration.

    h, s <- cell([mu_j, v_ij, a_i, c_ij], (h, s));  c <- softmax_i(phi(h));  at the end, Eq. 14,
    logit a_j = psi(sum_i c_i s_i). hidden_size: of the cell; phi, psi: hidden layers (Table 2).
    """

    def __init__(self, out_channels, pose_size=4, iterations=3, hidden_size=16, phi=(), psi=()):
        super().__init__(iterations)
        entries = pose_size**2
        self.cell = nn.LSTMCell(2 * entries + 2, hidden_size)
        with torch.no_grad():  # it expects entries near 1; here they are about 1/8
            self.cell.weight_ih[:, : 2 * entries] *= math.sqrt(entries)
        self.phi = mlp(hidden_size, *phi, 1)
        self.psi = mlp(hidden_size, *psi, 1)

    def initial_state(self, votes, fields):
        zeros = votes.new_zeros(math.prod(votes.shape[:-1]), self.cell.hidden_size)
        return zeros, zeros

    def compatibility(self, mu, votes, log_a, c, state):
        a = log_a.exp().expand_as(c)
        x = torch.cat([mu.unsqueeze(-2).expand_as(votes), votes, torch.stack([a, c], -1)], -1)
        h, s = self.cell(x.flatten(0, -2), state)  # a row for each vote
        return self.phi(h).view_as(c).softmax(-1), (h, s)

    def activation(self, mu, votes, log_a, c, state):
        return self.psi(update_pose(c, state[1].unflatten(0, c.shape))).flatten(-2)


# ---------------------------------------------------- the procedures that the paper compares with


def log_softmax_over_parents(logits: Tensor, fields) -> Tensor:
    """Normalise over *all* parents of each child. (..., L, O, I) -> (..., L, O, I).

    Where receptive fields overlap, a child's parents are the O channels of every position that
    sees it. Without fields (see `Routing`) no two positions share a child: (..., O, I) will do.
    """
    if fields is None:
        return logits.log_softmax(-2)
    children, num_inputs = fields
    here, index = logits.logsumexp(-2).flatten(-2), children.flatten()  # parents at one position
    top = here.new_full((*here.shape[:-1], num_inputs), -math.inf)
    top = top.scatter_reduce(-1, index.expand_as(here), here.detach(), "amax")[..., index]
    total = here.new_zeros(*here.shape[:-1], num_inputs)
    total = total.index_add(-1, index, (here - top).exp())[..., index]
    norm = total.log() + top  # (..., L*I): the parents everywhere
    return logits - norm.unflatten(-1, children.shape).unsqueeze(-2)


class EMRouting(Routing):
    """EM routing (EM paper): votes cluster around Gaussians, one for each output capsule.

    r_ij = R_ij a_i is the weight of vote i in cluster j, and c = r / sum_i r, so that the pose of
    Algorithm 1 is the M-step's mean. R is normalised over all parents of a child.
    The activation's lambda is inverse_temperature * (1 - 0.95^(t+1)) in iteration t = 0, 1, ...
    With 3 iterations this network fits smallNORB far worse, with 0.01 in 0.03's place somewhat.
    """

    def __init__(self, out_channels, pose_size=4, iterations=2, inverse_temperature=0.03):
        super().__init__(iterations)
        self.inverse_temperature = inverse_temperature
        self.beta_u = nn.Parameter(torch.zeros(out_channels))
        self.beta_a = nn.Parameter(torch.zeros(out_channels))

    def initial_state(self, votes, fields):
        log_p = torch.zeros_like(votes[..., 0])  # equal for all parents: R = 1 / their number
        return fields, 0, log_p, log_p.sum(-1)

    def compatibility(self, mu, votes, log_a, c, state):
        fields, t, log_p, _ = state
        log_r = log_softmax_over_parents(log_p, fields) + log_a
        c = log_r.softmax(-1)
        # M-step
        d2 = (votes - update_pose(c, votes).unsqueeze(-2)).square()  # (..., O, I, D)
        variance = update_pose(c, d2) + 1e-5
        log_sigma = 0.5 * variance.log()
        mass = log_r.logsumexp(-1).exp()
        cost = (self.beta_u.unsqueeze(-1) + log_sigma).sum(-1) * mass
        logit = self.inverse_temperature * (1 - 0.95 ** (t + 1)) * (self.beta_a - cost)
        # E-step: log(a_j p_ij), without the factor of (2 pi)^(D/2) that all parents share
        log_scale = F.logsigmoid(logit) - log_sigma.sum(-1)
        log_p = log_scale.unsqueeze(-1) - 0.5 * (d2 / variance.unsqueeze(-2)).sum(-1)
        return c, (fields, t + 1, log_p, logit)

    def activation(self, mu, votes, log_a, c, state):
        return state[-1]


class DynamicRouting(Routing):
    """Dynamic routing (dynamic paper): c_ij = softmax of b_ij over all parents j of child i.

    The pose is squash(s_j), s_j = sum_i c_ij v_ij. Its length is the activation: that of an input
    is in the length of its votes already, and log_a is not used.
    gain: multiplies the votes. Eq. 1 halves their length, and squash all but squares what is short:
        without a gain poses are 0.02 long in caps1, 0.0005 in caps2.
    """

    length_is_activation = True

    def __init__(self, out_channels, pose_size=4, iterations=3, gain=10.0):
        super().__init__(iterations)
        self.gain = gain

    def initial_state(self, votes, fields):
        return fields, None  # b, which is zero at first

    def compatibility(self, mu, votes, log_a, c, state):
        fields, b = state
        agreement = torch.einsum("...id,...d->...i", votes, self.gain * mu)
        b = torch.zeros_like(c) if b is None else b + agreement
        return log_softmax_over_parents(b, fields).exp(), (fields, b)

    def pose(self, mu, votes, c):
        s = self.gain * update_pose(c, votes)
        n2 = s.square().sum(-1, keepdim=True)
        return n2 / (1 + n2) * F.normalize(s, dim=-1)

    def activation(self, mu, votes, log_a, c, state):
        """a = ||squash(s)|| = ||s||^2 / (1 + ||s||^2), so logit a = log ||s||^2."""
        return (self.gain**2 * update_pose(c, votes).square().sum(-1) + 1e-12).log()


# ------------------------------------------------------------------------------- the layers


class PrimaryCaps(nn.Module):
    """Features to capsules: (B, features, *grid) -> pose (B, C, *grid, P, P), logit (B, C, *grid).

    Two convolutions with a kernel of 1, in spatial_dims dimensions.
    """

    def __init__(self, in_channels, out_channels, pose_size=4, spatial_dims=2):
        super().__init__()
        self.shape = (out_channels, pose_size, pose_size)
        conv = getattr(nn, f"Conv{spatial_dims}d")
        self.pose = conv(in_channels, math.prod(self.shape), kernel_size=1)
        self.logit = conv(in_channels, out_channels, kernel_size=1)

    def forward(self, features):
        pose = self.pose(features).unflatten(1, self.shape).movedim((2, 3), (-2, -1))
        return pose, self.logit(features)


class ConvCaps(nn.Module):
    """Convolutional capsules in 1, 2 or 3 dimensions, without padding.

    kernel_size, stride: a number, or one for each spatial dimension.
    routing: a `Routing` made for as many out_channels and the same pose_size.

    pose (B, C, *grid, P, P), logit (B, C, *grid)
        -> pose (B, O, *out, P, P), logit (B, O, *out), compatibility (B, O, *out, I)
    The inputs I go channel by channel, in each the cells of the kernel row by row.
    ValueError if pose and logit do not have these shapes, or the grid is smaller than the kernel.

        layer = ConvCaps(8, 16, kernel_size=3, stride=2, routing=SimilarityRouting(16))
        pose, logit, c = layer(torch.randn(2, 8, 14, 14, 4, 4), torch.randn(2, 8, 14, 14))
        # (2, 16, 6, 6, 4, 4), (2, 16, 6, 6), (2, 16, 6, 6, 72)
    """

    def __init__(self, in_channels, out_channels, kernel_size, routing, stride=1, pose_size=4,
                 spatial_dims=2):
        super().__init__()
        self.in_channels, self.routing = in_channels, routing
        self.kernel_size, self.stride = (
            (n,) * spatial_dims if isinstance(n, int) else tuple(n) for n in (kernel_size, stride))
        if {len(self.kernel_size), len(self.stride)} != {spatial_dims}:
            raise ValueError(f"kernel_size {kernel_size}, stride {stride}: expected a number, or "
                             f"{spatial_dims} of them, as spatial_dims says")
        inputs = in_channels * math.prod(self.kernel_size)
        noise = torch.empty(inputs, out_channels, pose_size, pose_size).uniform_(-0.1, 0.1)
        self.weight = nn.Parameter(torch.eye(pose_size) + noise)  # the author's initial values

    def forward(self, pose, logit):
        channels, *grid = logit.shape[1:]
        matrix = self.weight.shape[-2:]
        if (channels != self.in_channels or pose.shape != logit.shape + matrix
                or len(grid) != len(self.kernel_size)
                or any(n < k for n, k in zip(grid, self.kernel_size))):
            raise ValueError(f"pose {tuple(pose.shape)}, logit {tuple(logit.shape)}: expected "
                             f"{self.in_channels} channels, a grid of {self.kernel_size} or more, "
                             f"and {tuple(matrix)} after the logit's shape in the pose's")
        pose = F.normalize(pose, dim=(-2, -1), eps=1e-4)
        if self.routing.length_is_activation:
            pose = pose * logit.sigmoid()[..., None, None]
        num_inputs = math.prod(logit.shape[1:])
        index = torch.arange(num_inputs, device=logit.device).view(logit.shape[1:])
        for axis, (size, step) in enumerate(zip(self.kernel_size, self.stride), start=1):
            index = index.unfold(axis, size, step)  # in the end (C, *out, *kernel)
        index = index.movedim(0, len(grid)).flatten(len(grid))  # (*out, I)
        children = index.flatten(0, -2)  # (L, I): the inputs that each output position sees
        pose = pose.flatten(1, -3)[:, children]  # (B, L, I, P, P)
        log_a = F.logsigmoid(logit).flatten(1)[:, children]  # (B, L, I)
        votes = compute_votes(pose, self.weight)  # (B, L, O, I, D)
        with torch.autocast(votes.device.type, enabled=False):  # its bfloat16 has too few bits
            exact = self.weight.dtype
            routed = self.routing(votes.to(exact), log_a.to(exact), (children, num_inputs))
        mu, logit, c = (x.transpose(1, 2).unflatten(2, index.shape[:-1]) for x in routed)
        return mu.unflatten(-1, pose.shape[-2:]), logit, c


# ------------------------------------------------------------------------------ the network

ROUTINGS = {"similarity": SimilarityRouting, "connectionist": ConnectionistRouting,
            "em": EMRouting, "dynamic": DynamicRouting}
SIZES = {  # Q of Eq. 15, the gain theta_1 and Table 2, where they are not the routing's defaults
    "caps1": {},
    "caps2": {"connectionist": dict(phi=(32, 32), psi=(64, 64))},
    "class_caps": {"similarity": dict(num_kernels=10, theta1=60.0),
                   "connectionist": dict(phi=(64, 64), psi=(124, 124))}}


class CapsNet(nn.Module):
    """Table 1: a convolution, primary capsules, two convolutional capsule layers, class capsules.

    image_shape: (channels, *spatial), one to three spatial dimensions of 17 or more each.
    routing: one of ROUTINGS; routing_options go to the routing of all three layers: iterations=2.
    channels: of the convolution and of the three capsule layers below the classes.

    forward(images (B, *image_shape)) -> poses (B, num_classes, P, P), logits (B, num_classes)
    In float16 under autocast only: .half() underflows.
    ValueError if image_shape is too small for the kernels, routing is not one of ROUTINGS, channels
    are not four, or the images have another shape.
    """

    def __init__(self, image_shape, num_classes, routing="similarity", channels=(64, 8, 16, 16),
                 pose_size=4, **routing_options):
        super().__init__()
        self.image_shape = tuple(image_shape)
        in_channels, *grid = self.image_shape
        dims = len(grid)
        for kernel, stride in ((5, 2), (3, 2), (3, 1)):
            grid = [(n - kernel) // stride + 1 for n in grid]
        if dims not in (1, 2, 3) or min(grid) < 1:
            raise ValueError(f"image_shape {self.image_shape}: expected (channels, *spatial), one "
                             "to three spatial dimensions of 17 or more")
        if routing not in ROUTINGS:
            raise ValueError(f"routing {routing!r}: expected one of {', '.join(ROUTINGS)}")
        features, primary, hidden1, hidden2 = channels
        conv, batch_norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")

        def caps(name, inputs, outputs, kernel_size, stride=1):
            options = SIZES[name].get(routing, {}) | routing_options
            procedure = ROUTINGS[routing](outputs, pose_size, **options)
            return ConvCaps(inputs, outputs, kernel_size, procedure, stride, pose_size, dims)

        self.conv = nn.Sequential(conv(in_channels, features, kernel_size=5, stride=2), nn.ReLU(),
                                  batch_norm(features))
        self.primary = PrimaryCaps(features, primary, pose_size, dims)
        self.caps1 = caps("caps1", primary, hidden1, kernel_size=3, stride=2)
        self.caps2 = caps("caps2", hidden1, hidden2, kernel_size=3)
        self.class_caps = caps("class_caps", hidden2, num_classes, kernel_size=grid)  # all of it

    def forward(self, images):
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images of {tuple(images.shape)}, expected (B, *{self.image_shape})")
        pose, logit = self.primary(self.conv(images))
        pose, logit, _ = self.caps1(pose, logit)
        pose, logit, _ = self.caps2(pose, logit)
        pose, logit, _ = self.class_caps(pose, logit)
        return pose.flatten(1, -3), logit.flatten(1)  # the classes' grid is a single cell
