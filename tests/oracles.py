"""The losses once more, in plain Python loops straight from the equations: slow, float64, nothing shared with them."""

import math


def vicreg(z1: list[list[float]], z2: list[list[float]], gamma: float = 1.0, eps: float = 1e-4) -> dict[str, float]:
    """The three terms of VICReg (arXiv 2105.04906, eq. 1 to 5) with the official code's normalisation."""
    n, d = len(z1), len(z1[0])
    total = sum((z1[b][j] - z2[b][j]) ** 2 for b in range(n) for j in range(d))
    variance = covariance = 0.0
    for z in (z1, z2):
        mean = [sum(z[b][j] for b in range(n)) / n for j in range(d)]
        for i in range(d):
            for j in range(d):
                c = sum((z[b][i] - mean[i]) * (z[b][j] - mean[j]) for b in range(n)) / (n - 1)
                if i == j:
                    variance += max(0.0, gamma - math.sqrt(c + eps)) / d / 2
                else:
                    covariance += c * c / d
    return {"invariance": total / (n * d), "variance": variance, "covariance": covariance}
