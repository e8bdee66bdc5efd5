"""Networks of physics: one whose forward differentiates itself, and one that works on spectra."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twenty_parts.training import Maker, Training, adamw, sgd


class Pinn(nn.Module):
    """A network that solves u_t + u u_x = 0: the residual needs first derivatives by its inputs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, points: Tensor, start: Tensor) -> Tensor:
        """The loss: residuals at points, and the start."""
        points = points.detach().requires_grad_()
        u = self.net(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        residual = slope[:, 1:] + u * slope[:, :1]
        wanted = torch.sin(torch.pi * start[:, :1])
        return residual.square().mean() + (self.net(start) - wanted).square().mean()


def pinn() -> Training:
    """A network whose forward differentiates itself once."""
    batches = []
    for i in range(4):
        points = torch.rand(32, 2, generator=torch.Generator().manual_seed(i))
        batches.append({"points": points, "start": points[:8] * torch.tensor([1.0, 0.0])})
    return Training(Pinn(), batches, lambda loss: loss, adamw)


class SpectralConvolution(nn.Module):
    """Li et al.: the lowest frequencies, each times a complex matrix of its own."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        shape = (2, width, width, modes, modes)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape [batch, width, height, width of the image]."""
        spectrum, m = torch.fft.rfft2(x), self.modes
        out = torch.zeros_like(spectrum)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weight[0])
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], self.weight[1])
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FourierOperator(nn.Module):
    """Three layers of spectral and pointwise convolutions."""

    def __init__(self, width: int = 12, modes: int = 4) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv2d(1, width, 1), nn.Conv2d(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(width, modes) for _ in range(3))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, field: Tensor, wanted: Tensor) -> Tensor:
        """The relative error."""
        x = self.lift(field)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = nn.functional.gelu(spectral(x) + pointwise(x))
        return (self.project(x) - wanted).norm() / wanted.norm()


def fourier_operator() -> Training:
    """A Fourier neural operator with complex weights."""
    batches = []
    for i in range(4):
        field = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(i))
        batches.append({"field": field, "wanted": field.roll(1, 2) - field.roll(1, 3)})
    return Training(FourierOperator(), batches, lambda loss: loss, sgd)


MAKERS: Mapping[str, Maker] = {"PINN": pinn, "Fourier operator": fourier_operator}
