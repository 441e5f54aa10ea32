"""BatchNorm folded into the layer before it, in float64 (methods.md 11.1, 11.2, 11.3; arXiv:1712.05877, 1806.08342).

sigma = sqrt(var + eps), k = gamma / sigma, with gamma := 1 where the layer fixes it; L is the layer's linear map, Q the
weight quantizer, whose gradient passes straight through.

merged    w' = k w,  b' = (b - mean) k + beta
frozen    y = L(x, Q(k w)) + (b - mean) k + beta with running statistics, which stay; gradients reach gamma and beta
batch     y = L(x, Q(k_r w)) sigma_r / sigma_B + beta - (mean_B - b) k_B, statistics B of this batch's L(x, w) + b

A layer is one of the linear maps below: ``forward(x, w)``, ``to_x(g, w, x)``, ``to_w(g, x, w)`` (its two transposes).
Derivatives are worked out by hand; test_batchnorm.py beside this file checks them numerically.
"""
from dataclasses import dataclass
from itertools import product

import numpy as np

from .common import double


@dataclass
class Result:
    """One forward and backward pass: the output, the gradients, the statistics after the step (None: not asked)."""
    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    mean: np.ndarray
    var: np.ndarray


@dataclass
class Dense:
    """x (N, ...) taken as (N, in), w (out, in) -> (N, out)."""
    weight_axis: int = 0

    def forward(self, x, w):
        return x.reshape(len(x), -1) @ w.T

    def to_x(self, g, w, x):
        return (g @ w).reshape(x.shape)

    def to_w(self, g, x, w):
        return g.T @ x.reshape(len(x), -1)


@dataclass
class Convolution:
    """x (N, in, *size), w (out, in / groups, *kernel) -> (N, out, *size'): any number of spatial dimensions."""
    stride: tuple
    pad: tuple
    dilate: tuple = None
    groups: int = 1
    weight_axis: int = 0

    def forward(self, x, w):
        x, w = self._padded(x), self._grouped(w)
        return sum(np.einsum('ngi...,goi->ngo...', x[at], w[k])
                   for k, at in self._taps(x, w)).reshape(len(x), w.shape[0] * w.shape[1], *self._size(x, w))

    def to_x(self, g, w, x):
        dx, w = np.zeros_like(self._padded(x)), self._grouped(w)
        g = g.reshape(len(g), self.groups, -1, *g.shape[2:])
        for k, at in self._taps(dx, w):
            dx[at] += np.einsum('ngo...,goi->ngi...', g, w[k])
        inner = tuple(slice(p, p + n) for p, n in zip(self.pad, x.shape[2:]))
        return dx[(slice(None),) * 3 + inner].reshape(x.shape)

    def to_w(self, g, x, w):
        x, dw = self._padded(x), np.zeros_like(self._grouped(w))
        g = g.reshape(len(g), self.groups, len(w) // self.groups, -1)
        for k, at in self._taps(x, dw):
            dw[k] = np.einsum('ngop,ngip->goi', g, x[at].reshape(*x.shape[:3], -1))
        return dw.reshape(w.shape)

    def _padded(self, x):
        x = np.pad(x, ((0, 0), (0, 0), *[(p, p) for p in self.pad]))
        return x.reshape(len(x), self.groups, -1, *x.shape[2:])

    def _grouped(self, w):
        return w.reshape(self.groups, -1, *w.shape[1:])

    def _size(self, x, w):
        dilate = self.dilate or (1,) * len(self.pad)
        return [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[3:], w.shape[3:], self.stride, dilate)]

    def _taps(self, x, w):
        """For every place in the kernel: the index of its weights and of the inputs it meets."""
        dilate = self.dilate or (1,) * len(self.pad)
        sizes = self._size(x, w)
        for place in product(*map(range, w.shape[3:])):
            at = tuple(slice(p * d, p * d + (n - 1) * s + 1, s)
                       for p, d, n, s in zip(place, dilate, sizes, self.stride))
            yield (slice(None),) * 3 + place, (slice(None),) * 3 + at


@dataclass
class Transposed:
    """The transposed convolution: x (N, in, *size), w (in, out, *kernel) -> (N, out, *size')."""
    stride: tuple
    pad: tuple
    adjust: tuple = None
    weight_axis: int = 1

    def forward(self, x, w):
        adjust = self.adjust or (0,) * len(self.pad)
        size = [(n - 1) * s - 2 * p + k + a
                for n, s, p, k, a in zip(x.shape[2:], self.stride, self.pad, w.shape[2:], adjust)]
        return Convolution(self.stride, self.pad).to_x(x, w, np.zeros((len(x), w.shape[1], *size)))

    def to_x(self, g, w, x):
        return Convolution(self.stride, self.pad).forward(g, w)

    def to_w(self, g, x, w):
        return Convolution(self.stride, self.pad).to_w(x, g, w)


def along(values, ndim, axis):
    """One value per channel, to be broadcast along ``axis`` of an array with ``ndim`` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def merged(layer, weight, bias, gamma, beta, mean, var, eps, *, fix_gamma=False):
    """The weight and the bias of 11.1."""
    weight, bias, gamma, beta, mean, var = prepared(weight, bias, gamma, beta, mean, var, fix_gamma)
    k = gamma / np.sqrt(var + eps)
    return weight * along(k, weight.ndim, layer.weight_axis), (bias - mean) * k + beta


def normalized(y, gamma, beta, mean, var, eps, *, fix_gamma=False):
    """BatchNorm itself, with the statistics given."""
    _, _, gamma, beta, mean, var = prepared(y, None, gamma, beta, mean, var, fix_gamma)
    y = double(y)
    return (y - along(mean, y.ndim, 1)) * along(gamma / np.sqrt(var + eps), y.ndim, 1) + along(beta, y.ndim, 1)


def frozen(layer, x, weight, bias, gamma, beta, mean, var, eps, g, *, fix_gamma=False, quantize=lambda w: w):
    """11.2, in training as in inference. ``g`` is the gradient of the output, ``quantize`` rounds the folded weight."""
    x, g = double(x), double(g)
    weight, bias, gamma, beta, mean, var = prepared(weight, bias, gamma, beta, mean, var, fix_gamma)
    sigma = np.sqrt(var + eps)
    k = gamma / sigma
    k_w = along(k, weight.ndim, layer.weight_axis)
    rounded = double(quantize(k_w * weight))
    y = layer.forward(x, rounded)
    y = y + along((bias - mean) * k + beta, y.ndim, 1)

    dfolded = layer.to_w(g, x, weight)
    total = per_channel(g, 1)
    dk = per_channel(dfolded * weight, layer.weight_axis) + total * (bias - mean)
    return Result(y, layer.to_x(g, rounded, x), dfolded * k_w, total * k,
                  np.zeros_like(dk) if fix_gamma else dk / sigma, total, mean, var)


def batch(layer, x, weight, bias, gamma, beta, mean, var, eps, g, *, momentum=0.9, fix_gamma=False,
          quantize=lambda w: w):
    """11.3, one training step. Inference is that of ``frozen``.

    k_B / k_r = sigma_r / sigma_B: gamma cancels, also where it is 0. The bias moves mean_B and so cancels too.
    """
    x, g = double(x), double(g)
    weight, bias, gamma, beta, mean, var = prepared(weight, bias, gamma, beta, mean, var, fix_gamma)
    sigma = np.sqrt(var + eps)
    plain = layer.forward(x, weight)
    others = tuple(axis for axis in range(plain.ndim) if axis != 1)
    batch_mean, batch_var = plain.mean(axis=others), plain.var(axis=others)
    batch_sigma = np.sqrt(batch_var + eps)
    ratio = sigma / batch_sigma
    factor = along(gamma / sigma, weight.ndim, layer.weight_axis)
    rounded = double(quantize(factor * weight))
    z = layer.forward(x, rounded)
    y = z * along(ratio, z.ndim, 1) + along(beta - batch_mean * gamma / batch_sigma, z.ndim, 1)

    total = per_channel(g, 1)
    scaled = g * along(ratio, g.ndim, 1)
    dfolded = layer.to_w(scaled, x, weight)
    dgamma = per_channel(dfolded * weight, layer.weight_axis) / sigma - total * batch_mean / batch_sigma
    dsigma = -per_channel(g * z, 1) * ratio / batch_sigma + total * batch_mean * gamma / batch_sigma ** 2
    count = plain.size / plain.shape[1]
    dplain = (along(-total * gamma / batch_sigma, plain.ndim, 1)
              + along(dsigma / batch_sigma, plain.ndim, 1) * (plain - along(batch_mean, plain.ndim, 1))) / count
    return Result(y, layer.to_x(scaled, rounded, x) + layer.to_x(dplain, weight, x),
                  dfolded * factor + layer.to_w(dplain, x, weight), np.zeros_like(bias),
                  np.zeros_like(dgamma) if fix_gamma else dgamma, total,
                  momentum * mean + (1 - momentum) * (batch_mean + bias),
                  momentum * var + (1 - momentum) * batch_var)


def prepared(weight, bias, gamma, beta, mean, var, fix_gamma):
    weight, gamma, beta, mean, var = map(double, (weight, gamma, beta, mean, var))
    bias = np.zeros_like(beta) if bias is None else double(bias)
    return weight, bias, np.ones_like(gamma) if fix_gamma else gamma, beta, mean, var


def per_channel(values, axis):
    """The sum over all axes but one."""
    return values.sum(axis=tuple(other for other in range(values.ndim) if other != axis))
