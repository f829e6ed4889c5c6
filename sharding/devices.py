"""What the chips can do: one table, with sources."""

# Peak bfloat16 FLOP/s of one jax.Device by the start of its `device_kind`. TPU figures from the
# Google Cloud TPU system architecture pages (a v7x chip is two devices), GPU figures (dense) from
# the vendor's data sheets. The first entry that matches counts.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device, None when the table does not know the kind."""
    for prefix, peak in PEAK_FLOPS:
        if device_kind.startswith(prefix):
            return peak
    return None
