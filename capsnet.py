"""Capsule networks whose routing is learned: "Learning to compute inner consensus" (Faria, 2019).

One file, nothing but torch. Read it beside the paper from top to bottom, or copy it and write

    net = CapsNet(image_shape=(1, 32, 32), num_classes=5, routing="similarity")
    poses, logits = net(torch.randn(8, 1, 32, 32))   # (8, 5, 4, 4), (8, 5)
    optimizer = torch.optim.Adam(net.parameter_groups(lr=1.2e-2))  # connectionist: 3e-3

Glossary (EM paper: Hinton et al., ICLR 2018; dynamic paper: Sabour et al., NeurIPS 2017)

    code              symbol      where    what it is
    pose, mu          M_i, mu_j            what a capsule says about its part: a P x P matrix
    logit, log_a      a_i, a_j             the activation a = sigmoid(logit); log a, kept finite
    weight            W_ij        Eq. 1    takes the pose of input i to its vote for output j
    votes             v_ij        Eq. 1    what i predicts for the pose of j
    c, compatibility  c_ij        Eq. 3    share of vote i in mu_j: sums to 1 over i (dynamic: j)
    k, similarity     k(mu, v)    Eq. 15   a mixture of Gaussians of the distance

Axes, the same letters everywhere

    B images   C, O input and output channels   P side of a pose, D = P * P entries
    I inputs of one receptive field (the paper's N): ordered by channel, then by cell
    N receptive fields, one for each output position of each image

Between layers poses are (B, C, *grid, P, P), logits (B, C, *grid). Inside a layer the inputs come
first and the receptive fields last: Eq. 1 is then one batched product that copies no votes.

What makes them capsules is equivariance: if all input poses of a layer become M_i R, R orthogonal,
its output poses become mu_j R, while c and activations do not change. This is exact for similarity
and dynamic routing; EM (a variance for each entry) and the LSTM can only learn it.

Where this departs from the paper, or chooses what the paper leaves open (training: train.py)

    * Before it votes, every pose is divided by its Frobenius norm, as in the author's early
      versions; his later ones divide primary poses only. Without this the norms of votes halve
      (P = 4) in every layer. With it no pose above the primary ones has a norm above 1: to regress
      one, add a scale.
    * No coordinates are added to poses. In short trials those of the input raised the error on new
      toys; the author's (output position, slot in the field) were not tried.
    * Primary poses have no ReLU (the author's do).
    * lambda1, lambda2 and the kernel widths are learned as logarithms, so they stay positive.
    * lambda1 and lambda2 start at 0.2, theta_1 at 20 (class capsules: 60). With the author's 12 and
      1, and a small theta_1, c stays uniform and all images get nearly the same class logits.
      theta_2 starts at 0, theta_3 at 1; primary activations near 1/2 (the author's near 0.7).
    * Connectionist routing starts with larger weights: with PyTorch's, its class logits hardly
      differ between images.
"""

import math
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------- votes, and Algorithm 1


def compute_votes(pose, weight):
    """Eq. 1: v_ij = (W_ij / ||W_ij||_F) M_i.

    pose (I, P, P, N), weight (I, O, P, P) -> votes (I, O, D, N). At weight = 0 the votes and their
    gradients are finite.
    """
    weight = F.normalize(weight, dim=(-2, -1), eps=1e-6)
    return torch.einsum("iopq,iqrn->ioprn", weight, pose).flatten(2, 3)


def update_pose(compatibility, votes):
    """Eq. 4: mu = sum_i c_i v_i. (I, O, N), (I, O, D, N) -> (O, D, N)."""
    return (compatibility.unsqueeze(2) * votes).sum(0)


class Routing(nn.Module):
    """Algorithm 1: alternate between compatibilities and poses, then decide on the activations.

    votes (I, O, D, N), log_a (I, 1, N), finite -> pose (O, D, N), logit (O, N), c (I, O, N)

    A routing procedure is a subclass that defines `compatibility` and `activation`. `state`, S in
    the paper, is what one call of `compatibility` hands to the next, at first None. EM and dynamic
    routing replace `forward`: they start from equal shares over an input's parents and need
    `fields`, see `log_softmax_over_parents`. `CapsNet` finds a procedure in ROUTINGS and constructs
    it as (out_channels, pose_size=..., **options). iterations: 1 or more; similarity routing also
    takes 0, the mean vote.

        mu, logit, c = SimilarityRouting(5)(torch.randn(72, 5, 16, 2) / 10, torch.zeros(72, 1, 2))
        assert torch.allclose(c.sum(0), torch.ones(5, 2))  # not so in dynamic routing
    """

    def __init__(self, out_channels, iterations):
        super().__init__()
        self.out_channels, self.iterations = out_channels, iterations

    def forward(self, votes, log_a, fields=None):
        assert log_a.shape == votes[:, :1, 0].shape  # (I, 1, N); another would broadcast
        state, c = None, torch.full_like(votes[:, :, 0], 1 / len(votes))  # (I, O, N)
        mu = update_pose(c, votes)  # (O, D, N)
        for _ in range(self.iterations):
            c, state = self.compatibility(mu, votes, log_a, c, state)
            mu = update_pose(c, votes)
        return mu, self.activation(mu, votes, log_a, c, state), c

    def compatibility(self, mu, votes, log_a, c, state):
        """(O, D, N), (I, O, D, N), (I, 1, N), (I, O, N), S -> c (I, O, N), S."""
        raise NotImplementedError

    def activation(self, mu, votes, log_a, c, state):
        """The same arguments -> logit (O, N)."""
        raise NotImplementedError


# ------------------------------------------------------------------- Section 4.1: similarity


def routing_objective(similarity, compatibility, log_a, lambda1, lambda2):
    """Eq. 2: J = -sum c k + lambda1 sum c log(c I) + lambda2 sum c log(c / a).

    similarity, compatibility, log_a (I, ...) -> (...). lambda1 draws c to equal shares, lambda2 to
    shares in proportion to a. Routing alternates between the best c for the poses, Eq. 11, and the
    best poses for c: Eq. 4, if k is -||mu - v||^2. With the k of Eq. 15 that is an approximation
    and may raise J.
    """
    c, c_log_c = compatibility, torch.xlogy(compatibility, compatibility)  # 0 log 0 = 0
    penalty = lambda1 * (c_log_c + c * math.log(len(c))) + lambda2 * (c_log_c - c * log_a)
    return (penalty - c * similarity).sum(0)


def update_compatibility(similarity, log_a, lambda1, lambda2):
    """Eq. 11: the c that minimises `routing_objective` for fixed poses.

    similarity (I, ...), log_a (I, ...) -> (I, ...); the lambdas broadcast against these.
    Softmax over the first axis, the *input* capsules: every output capsule spreads one unit of
    attention over its votes. (EM and dynamic routing share out an input over its parents instead.)
    """
    return ((similarity + lambda2 * log_a) / (lambda1 + lambda2)).softmax(0)


class SimilarityRouting(Routing):
    """Section 4.1: routing by alternation on an objective (Eq. 2) whose parameters are learned.

    num_kernels: Q of Eq. 15, shared by all channels.
    widths: the smallest and largest initial sigma_q, evenly spaced in logarithm (a single one has
        the first); of the order of the distances to the votes, in `ConvCaps` about 0.3 to 0.5.
    lambda1, lambda2, theta1: initial values; each output channel learns its own. theta_1 must be
        large, as k <= 1. One lambda may be zero, and stays so, but becomes NaN (its
        logarithm is infinite) under Adam's weight decay or in an average of weights.
    """

    def __init__(self, out_channels, *, pose_size=4, iterations=3, num_kernels=4, widths=(0.1, 1.0),
                 lambda1=0.2, lambda2=0.2, theta1=20.0):
        super().__init__(out_channels, iterations)
        lambdas, theta = torch.tensor([lambda1, lambda2]), torch.tensor([theta1, 0.0, 1.0])
        self.log_lambda = nn.Parameter(lambdas.log()[:, None].repeat(1, out_channels))
        self.theta = nn.Parameter(theta[:, None].repeat(1, out_channels))
        self.kernel_logit = nn.Parameter(torch.zeros(num_kernels))
        self.log_width = nn.Parameter(torch.linspace(*map(math.log, widths), num_kernels))

    def similarity(self, mu, votes):
        """Eq. 15: k(mu, v_i) = sum_q w_q exp(-||mu - v_i||^2 / (2 sigma_q^2)), (I, O, N)."""
        d2 = (votes - mu).square().sum(2)
        weights, factors = self.kernel_logit.softmax(0), -0.5 * (-2 * self.log_width).exp()
        return sum(w * (f * d2).exp() for w, f in zip(weights, factors))

    def compatibility(self, mu, votes, log_a, c, state):
        lambda1, lambda2 = self.log_lambda.exp().unsqueeze(-1)  # (O, 1) each
        return update_compatibility(self.similarity(mu, votes), log_a, lambda1, lambda2), state

    def activation(self, mu, votes, log_a, c, state):
        """Eq. 13: logit a = theta_1 sum_i c_i k_i + theta_2 + |theta_3| sum_i c_i log a_i."""
        theta1, theta2, theta3 = self.theta.unsqueeze(-1)  # (O, 1) each
        agreement, evidence = (c * self.similarity(mu, votes)).sum(0), (c * log_a).sum(0)
        return theta1 * agreement + theta2 + theta3.abs() * evidence


# --------------------------------------------------------------- Section 4.2: connectionist


def mlp(*sizes):
    """Linear layers with ReLU between them, in He initialisation."""
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    for linear in layers[::2]:
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers[:-1])


class ConnectionistRouting(Routing):
    """Section 4.2, Algorithm 2: one LSTM cell reads all votes, iteration after iteration.

        h_ij, s_ij = cell([mu_j, v_ij, a_i, c_ij], (h_ij, s_ij))   # the hidden and the cell state
        c_ij = softmax_i(phi(h_ij))
        logit_j = psi(sum_i c_ij s_ij)                             # Eq. 14, after the iterations

    The cell is written out below, so that the products of its weights with v_ij are computed once
    for all iterations, and those with mu_j once for all i.
    hidden_size: of the cell; phi, psi: their hidden layers (Table 2).
    """

    def __init__(self, out_channels, *, pose_size=4, iterations=3, hidden_size=16, phi=(), psi=()):
        super().__init__(out_channels, iterations)
        entries = pose_size**2
        self.cell = nn.LSTMCell(2 * entries + 2, hidden_size)
        with torch.no_grad():  # PyTorch's weights are too small for votes, with entries near 1/8
            self.cell.weight_ih[:, : 2 * entries] *= math.sqrt(entries)
        self.phi = mlp(hidden_size, *phi, 1)
        self.psi = mlp(hidden_size, *psi, 1)

    def compatibility(self, mu, votes, log_a, c, state):
        cell, entries = self.cell, mu.shape[1]
        w_mu, w_vote, w_a, w_c = cell.weight_ih.split((entries, entries, 1, 1), 1)
        w_a, w_c, bias = (x.view(-1, 1, 1, 1) for x in (w_a, w_c, cell.bias_ih + cell.bias_hh))
        if state is None:  # fixed: what v and a add to the gates, the same in all iterations
            fixed = torch.einsum("gd,iodn->gion", w_vote, votes) + w_a * log_a.exp() + bias
            recurrent = s = 0  # h and s start as zeros
        else:
            fixed, h, s = state
            recurrent = torch.einsum("gh,hion->gion", cell.weight_hh, h)
        from_mu = torch.einsum("gd,odn->gon", w_mu, mu).unsqueeze(1)
        gates = fixed + from_mu + w_c * c + recurrent  # (4 hidden_size, I, O, N)
        i, f, g, o = gates.chunk(4)  # (hidden_size, I, O, N) each
        s = f.sigmoid() * s + i.sigmoid() * g.tanh()
        h = o.sigmoid() * s.tanh()
        b = self.phi(h.flatten(1).T).view_as(c).to(c.dtype)  # autocast may have made it bfloat16
        return b.softmax(0), (fixed, h, s)

    def activation(self, mu, votes, log_a, c, state):
        _, _, s = state
        return self.psi((c * s).sum(1).movedim(0, -1)).squeeze(-1).to(c.dtype)


# ------------------------------------------------------------------------------- the layers


class PrimaryCaps(nn.Module):
    """Two convolutions with a kernel of 1, in spatial_dims dimensions.

    (B, features, *grid) -> pose (B, C, *grid, P, P), logit (B, C, *grid)
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
    """Convolutional capsules in 1, 2 or 3 dimensions: W is the same at all positions; no padding.

    kernel_size, stride: a number, or one for each spatial dimension.
    routing: a `Routing` made for as many out_channels and the same pose_size.

    pose (B, C, *grid, P, P), logit (B, C, *grid)
        -> pose (B, O, *out, P, P), logit (B, O, *out), compatibility (B, O, *out, I)

        layer = ConvCaps(8, 16, kernel_size=3, stride=2, routing=SimilarityRouting(16))
        pose, logit, c = layer(torch.randn(2, 8, 14, 14, 4, 4), torch.randn(2, 8, 14, 14))
        # (2, 16, 6, 6, 4, 4), (2, 16, 6, 6), (2, 16, 6, 6, 72)
    """

    def __init__(self, in_channels, out_channels, kernel_size, routing, stride=1, pose_size=4,
                 spatial_dims=2):
        super().__init__()
        assert routing.out_channels == out_channels, "routing: made for other out_channels"
        self.routing = routing
        self.kernel_size, self.stride = (
            (n,) * spatial_dims if isinstance(n, int) else tuple(n) for n in (kernel_size, stride))
        inputs = in_channels * math.prod(self.kernel_size)
        noise = torch.empty(inputs, out_channels, pose_size, pose_size).uniform_(-0.1, 0.1)
        self.weight = nn.Parameter(torch.eye(pose_size) + noise)  # the author's initial values

    def receptive_fields(self, x):
        """(B, C, *grid, ...) -> (I, ..., N), and the shape that N unflattens to, (B, *out)."""
        windows = [[slice(k, n - size + k + 1, step) for k in range(size)]
                   for n, size, step in zip(x.shape[2:], self.kernel_size, self.stride)]
        x = x.transpose(0, 1)
        # Slices, not unfold, whose backward torch 2.13 compiles wrongly for several threads.
        x = torch.stack([x[:, :, *window] for window in product(*windows)], 1).flatten(0, 1)
        places = x.shape[1:2 + len(windows)]  # x: (I, B, *out, ...)
        return x.flatten(1, len(places)).movedim(1, -1), places

    def forward(self, pose, logit):
        matrix, dims = self.weight.shape[-2:], len(self.kernel_size)
        assert pose.shape == logit.shape + matrix and logit.ndim == 2 + dims, (
            f"pose {tuple(pose.shape)}, logit {tuple(logit.shape)}, {dims} spatial dimensions")
        assert all(n >= k for n, k in zip(logit.shape[2:], self.kernel_size)), "kernel over grid"
        pose = F.normalize(pose, dim=(-2, -1), eps=1e-4)  # a shorter pose is noise: it stays short
        pose, places = self.receptive_fields(pose)  # (I, P, P, N)
        assert len(pose) == len(self.weight), f"{len(pose)} inputs, W has {len(self.weight)}"
        log_a = F.logsigmoid(self.receptive_fields(logit)[0].clamp_min(-1e4))  # (I, N), finite
        index = torch.arange(logit.numel(), device=logit.device).view(logit.shape)
        fields = (self.receptive_fields(index)[0], logit.numel())  # for EM and dynamic routing
        votes = compute_votes(pose, self.weight)
        votes = votes.to(self.weight.dtype)  # distances need more bits than autocast's bfloat16
        routed = self.routing(votes, log_a.to(votes.dtype).unsqueeze(1), fields)
        shapes = [votes[0].shape, votes[0, :, 0].shape, votes[:, :, 0].shape]
        assert [x.shape for x in routed] == shapes, f"mu, logit, c of routing: expected {shapes}"
        mu, logit, c = (x.unflatten(-1, places).movedim(-1 - dims, 0) for x in routed)
        # (B, O, D, *out), (B, O, *out), (B, I, O, *out)
        return mu.movedim(2, -1).unflatten(-1, matrix), logit, c.movedim(1, -1)


# ------------------------------------------------------------------------------ the network

ROUTINGS = {  # the class, and where caps1, caps2 and class_caps differ from its defaults
    "similarity": (SimilarityRouting, {}, {}, dict(num_kernels=10, theta1=60.0)),
    "connectionist": (ConnectionistRouting, {}, dict(phi=(32, 32), psi=(64, 64)),
                      dict(phi=(64, 64), psi=(124, 124)))}  # as in Table 2


class CapsNet(nn.Module):
    """Table 1: a convolution, primary capsules, two convolutional capsule layers, class capsules.

    image_shape: (channels, *spatial), one to three spatial dimensions of 17 or more each, such as
        (1, height, width) for grey images.
    pose_size: P, 2 or more; with 1, division by the norm would leave only a sign.
    routing: one of ROUTINGS; routing_options, such as iterations=2, are for its three layers, and
        override those of ROUTINGS.
    channels: of the convolution and of the three capsule layers below the classes.

    images (B, *image_shape) -> poses (B, num_classes, P, P), logits (B, num_classes)
    For float16 or bfloat16 use autocast: .half() can give NaN.
    """

    def __init__(self, image_shape, num_classes, routing="similarity", channels=(64, 8, 16, 16),
                 pose_size=4, **routing_options):
        super().__init__()
        self.image_shape = in_channels, *grid = tuple(image_shape)
        dims = len(grid)
        for kernel, stride in ((5, 2), (3, 2), (3, 1)):
            grid = [(n - kernel) // stride + 1 for n in grid]
        assert min(grid) >= 1, f"image_shape {image_shape}: expected (channels, 17 or more, ...)"
        procedure, *defaults = ROUTINGS[routing]
        features, primary, hidden1, hidden2 = channels
        conv, batch_norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")

        def caps(inputs, outputs, options, kernel_size, stride=1):
            routing = procedure(outputs, pose_size=pose_size, **options | routing_options)
            return ConvCaps(inputs, outputs, kernel_size, routing, stride, pose_size, dims)

        self.conv = nn.Sequential(conv(in_channels, features, kernel_size=5, stride=2), nn.ReLU(),
                                  batch_norm(features))
        self.primary = PrimaryCaps(features, primary, pose_size, dims)
        self.caps1 = caps(primary, hidden1, defaults[0], kernel_size=3, stride=2)
        self.caps2 = caps(hidden1, hidden2, defaults[1], kernel_size=3)
        self.class_caps = caps(hidden2, num_classes, defaults[2], kernel_size=grid)  # all of it

    def forward(self, images):
        assert images.shape[1:] == self.image_shape, (images.shape, self.image_shape)
        pose, logit = self.primary(self.conv(images))
        for layer in (self.caps1, self.caps2, self.class_caps):
            pose, logit, _ = layer(pose, logit)
        return pose.flatten(1, -3), logit.flatten(1)  # the classes' grid is a single cell

    def parameter_groups(self, lr):
        """For an optimizer: lambdas, thetas and EM's betas have further to go than weights and
        learn at five times the rate. Kernels do not: at that rate they soon become far narrower or
        wider than all distances; k is then the same for all votes, and its gradient vanishes."""
        far = "log_lambda", "theta", "beta_u", "beta_a"
        return [{"params": [p for name, p in self.named_parameters() if name.endswith(far) == fast],
                 "lr": 5 * lr if fast else lr} for fast in (False, True)]


# ---------------------------------------------------- the procedures that the paper compares with


def log_softmax_over_parents(logits, fields):
    """Normalise over *all* parents of each input. (I, O, N) -> (I, O, N).

    Where receptive fields overlap, the parents of an input are the O channels of every position
    that sees it. fields: (which input is in which slot (I, N), number of inputs); None if no two
    fields share an input.
    """
    if fields is None:
        return logits.log_softmax(1)
    inputs, num_inputs = fields
    here, index = logits.logsumexp(1).flatten(), inputs.flatten()  # the parents at one position
    top = here.new_full((num_inputs,), -math.inf)
    top = top.scatter_reduce(0, index, here.detach(), "amax")[index]
    total = here.new_zeros(num_inputs).index_add(0, index, (here - top).exp())[index]
    return logits - (total.log() + top).view_as(inputs).unsqueeze(1)


class EMRouting(Routing):
    """EM routing (EM paper): votes cluster around Gaussians, one for each output capsule.

    r_ij = R_ij a_i is the weight of vote i in cluster j, and c = r / sum_i r, so that the mean of
    the M-step is Eq. 4. R, at first equal, is normalised over all parents of an input.
    The activation's lambda is inverse_temperature * (1 - 0.95^(t+1)) in iteration t = 0, 1, ...
    The EM paper: 3 iterations (worse here, in short trials) and 0.01, votes M W, spread loss.
    """

    def __init__(self, out_channels, *, pose_size=4, iterations=2, inverse_temperature=0.03):
        super().__init__(out_channels, iterations)
        self.inverse_temperature = inverse_temperature
        self.beta_u = nn.Parameter(torch.zeros(out_channels))
        self.beta_a = nn.Parameter(torch.zeros(out_channels))

    def forward(self, votes, log_a, fields=None):
        assert log_a.shape == votes[:, :1, 0].shape
        log_ap = torch.zeros_like(votes[:, :, 0])  # log(a_j p_ij), up to a term all parents share
        for t in range(self.iterations):
            # M-step, with R_ij = a_j p_ij / sum_k a_k p_ik
            log_r = log_softmax_over_parents(log_ap, fields) + log_a  # (I, O, N)
            c = log_r.softmax(0)
            mu = update_pose(c, votes)  # (O, D, N)
            d2 = (votes - mu).square()
            variance = update_pose(c, d2) + 1e-5  # (O, D, N)
            log_sigma = 0.5 * variance.log()
            cost = (self.beta_u[:, None, None] + log_sigma).sum(1) * log_r.exp().sum(0)
            inverse = self.inverse_temperature * (1 - 0.95 ** (t + 1))
            logit = inverse * (self.beta_a[:, None] - cost)  # (O, N)
            # E-step
            log_ap = F.logsigmoid(logit) - (log_sigma + 0.5 * d2 / variance).sum(2)
        return mu, logit, c


class DynamicRouting(Routing):
    """Dynamic routing (dynamic paper): c_ij = softmax of b_ij over all parents j of input i.

    The pose is squash(s_j), s_j = sum_i c_ij v_ij, its length the activation. `ConvCaps` removes
    that length before poses vote: hence the factor a_i of votes. c sums to 1 over the parents.
    gain: a further factor of the votes, not in the paper. Those of Eq. 1 are short, and squash
        makes a short s about ||s||^2 long: without a gain, poses of an untrained network are 0.02
        long in caps1, 0.0005 in caps2.
    """

    def __init__(self, out_channels, *, pose_size=4, iterations=3, gain=10.0):
        super().__init__(out_channels, iterations)
        self.gain = gain

    def forward(self, votes, log_a, fields=None):
        assert log_a.shape == votes[:, :1, 0].shape
        votes = self.gain * log_a.exp().unsqueeze(2) * votes
        b = torch.zeros_like(votes[:, :, 0])  # (I, O, N)
        for _ in range(self.iterations):
            c = log_softmax_over_parents(b, fields).exp()
            s = update_pose(c, votes)  # (O, D, N)
            n2 = s.square().sum(1, keepdim=True)
            mu = n2 / (1 + n2) * F.normalize(s, dim=1)
            b = b + (votes * mu).sum(2)
        # a = ||squash(s)|| = ||s||^2 / (1 + ||s||^2), so logit a = log ||s||^2
        return mu, (n2.squeeze(1) + 1e-12).log(), c


ROUTINGS |= {"em": (EMRouting, {}, {}, {}), "dynamic": (DynamicRouting, {}, {}, {})}
