"""Random inputs of `delta_scan`, of every update rule."""

import torch
import torch.nn.functional as F

NAMES = ("q", "k", "v", "log_keep", "erase", "write", "state")
RULES = ("standard", "lambda_outside", "no_lambda")


def make_inputs(tokens, rule="standard", *, batch=2, heads=2, rank=8, masked=0.0, dtype=torch.float32, seed=0):
    """Seven leaves that require gradients: q, k, v, log_keep, erase, write, state (nonzero)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, tokens, heads, rank)
    q, k = F.normalize(normal(*shape), dim=-1), F.normalize(normal(*shape), dim=-1)
    v, z = normal(*shape), normal(*shape) - 1.5
    log_lambda, beta = F.logsigmoid(-z), torch.sigmoid(z)
    log_keep, erase, write = {
        "standard": (log_lambda, beta, beta),
        "lambda_outside": (log_lambda, log_lambda.exp() * beta, beta),
        "no_lambda": (torch.zeros_like(z), beta, beta),
    }[rule]
    valid = (torch.rand(batch, tokens, 1, 1, generator=generator) >= masked).double()
    state = normal(batch, heads, rank, rank)
    inputs = (q, k, v, log_keep * valid, erase * valid, write * valid, state)
    return [x.to(dtype).detach().clone().requires_grad_() for x in inputs]
