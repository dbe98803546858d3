"""Networks that make trouble, as TorchScript can: for an image of nothing but white, or always."""

from __future__ import annotations

import torch


class Fussy(torch.nn.Module):
    """Raises for a batch with a white image in it."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert float(x.flatten(1).min(1)[0].max()) < 0.999, "too bright for me"
        return self.network(x)


class Deadly(torch.nn.Module):
    """Dies of SIGFPE for a batch with a white image in it: the least integer over -1 overflows."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        least = -9223372036854775807 - 1
        divisor = 1 if float(x.flatten(1).min(1)[0].max()) < 0.999 else -1
        return self.network(x) + float((least // divisor) * 0)


class Endless(torch.nn.Module):
    """Never returns for a batch with a white image in it."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        while float(y.flatten(1).min(1)[0].max()) > 0.999:
            y = torch.clamp(y + 1, 1.0, 2.0)
        return self.network(x)


class Stillborn(torch.nn.Module):
    """Dies of SIGFPE for every batch, the first one included."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        least = -9223372036854775807 - 1
        divisor = -int(x.size(1) // 3)
        return self.network(x) + float((least // divisor) * 0)


class Stray(torch.nn.Module):
    """Looks far behind the end of a table for a batch with a white image in it."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("table", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_white = x.flatten(1).min(1)[0].max() > 0.999
        return self.network(x) + self.table[is_white.long().reshape(1) * 1000000]
