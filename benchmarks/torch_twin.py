"""The plain PyTorch twin of the benchmark decoder: what `torch.compile` makes of the same step.

The yardstick of `benchmarks`, written the way a PyTorch user would: `nn.Module`,
`scaled_dot_product_attention`, `torch.optim.AdamW(fused=True)`, `torch.autocast` for bf16.
torch is an optional dependency, so it is imported inside the functions.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TwinShape:
    """Sizes of the decoder, in the letters of the repository; the defaults hold 14 M parameters."""

    L: int = 6
    D: int = 384
    N: int = 6
    F: int = 1536
    T: int = 256
    V: int = 8192


def build_twin(shape: TwinShape):
    """A pre-norm GELU decoder with learned positions, no biases and a tied head, in fp32."""
    from torch import nn
    from torch.nn import functional

    L, D, N, F, T, V = shape.L, shape.D, shape.N, shape.F, shape.T, shape.V

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = linear(D, 3 * D), linear(D, D)
            self.up, self.down = linear(D, F), linear(F, D)

        def forward(self, x_BxTxD):
            heads = self.qkv(self.attention_norm(x_BxTxD)).unflatten(-1, (3, N, D // N))
            q_BxNxTxH, k_BxNxTxH, v_BxNxTxH = heads.permute(2, 0, 3, 1, 4).unbind(0)
            mixed_BxNxTxH = functional.scaled_dot_product_attention(
                q_BxNxTxH, k_BxNxTxH, v_BxNxTxH, is_causal=True)
            x_BxTxD = x_BxTxD + self.out(mixed_BxNxTxH.transpose(1, 2).flatten(-2))
            hidden_BxTxF = functional.gelu(self.up(self.mlp_norm(x_BxTxD)), approximate="tanh")
            return x_BxTxD + self.down(hidden_BxTxF)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.norm, self.head = nn.LayerNorm(D), linear(D, V)
            self.head.weight = self.embed.weight
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, tokens_BxT):
            x_BxTxD = self.embed(tokens_BxT) + self.positions.weight[: tokens_BxT.shape[1]]
            for block in self.blocks:
                x_BxTxD = block(x_BxTxD)
            return self.head(self.norm(x_BxTxD))

    return Decoder()


def build_step(
    shape: TwinShape, dtype: str, *, compiled: bool = True, learning_rate: float = 1e-3
) -> Callable:
    """One AdamW step as `step(tokens_BxT, targets_BxT) -> loss`; both arguments are int64 tensors.

    Weights and optimizer state stay in fp32; dtype "bf16" runs the forward pass under autocast.
    The loss is a float, so a call returns only when the step is done.

    Raises:
        ValueError: dtype is neither "fp32" nor "bf16".
    """
    import torch
    from torch.nn import functional

    if dtype not in ("fp32", "bf16"):
        raise ValueError(f'dtype: expected "fp32" or "bf16", got {dtype!r}')
    torch.manual_seed(0)
    model = build_twin(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def mean_loss(tokens_BxT, targets_BxT):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits_BxTxV = model(tokens_BxT)
        return functional.cross_entropy(logits_BxTxV.float().flatten(0, 1), targets_BxT.flatten())

    forward = torch.compile(mean_loss) if compiled else mean_loss

    def step(tokens_BxT, targets_BxT) -> float:
        loss = forward(tokens_BxT, targets_BxT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
