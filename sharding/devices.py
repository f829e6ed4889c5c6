"""What the chips can do: one table, with sources."""

from typing import NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """One kind of jax.Device; of a chip that is two devices (TPU7x) half of the chip's figures.

    kind: how its `device_kind` starts. name: of TPU topologies ("v5p:4x4x4") and --gpu.
    flops: peak FLOP/s by dtype, dense; an absent dtype is unpublished, or is not in hardware.
    hbm_bytes: what a program may allocate. hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s that a device can send to its neighbours, over all its links together;
        a TPU has two links for each dim of its torus, a GPU one to every other GPU of the machine.
    network_bandwidth: bytes/s to what is not a neighbour: other slices, other machines.
    torus_dims: of the links; 0 is a switch. neighbours: devices that the links reach at most.
    matrix_width: head dims that fill the matrix unit; narrower ones leave the rest of it idle.
    """

    kind: str
    name: str
    flops: dict[str, float]
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus_dims: int
    neighbours: int
    matrix_width: int
    devices_per_chip: int = 1


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (the last compares v5p, v6e and TPU7x);
# links are given there as bidirectional, here is one direction: half (v4: arXiv:2304.01433).
# HBM is what the compiler calls available in its refusals (libtpu 0.0.52); v4: as documented. Network
# of v5e: 2 x 100 Gbit/s for a host of 8 chips; v4 likewise, for a host of 4. A TPU adds bf16
# products into fp32 and multiplies fp32 in several bf16 passes; no fp32 rate is published.
# GPU: the vendor's data sheets (SXM), dense; NVLink one direction; network is one 400 Gbit/s (A100:
# 200) adapter per GPU, as in DGX systems. JAX takes three quarters of a GPU's memory unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev, GPU memory allocation).
# The first entry that matches a device_kind counts.
DEVICES = (
    Device("TPU v4", "v4", {"bfloat16": 275e12, "int8": 275e12}, 32 * GIB, 1.2e12, 300e9,
           6.25e9, 3, 4096, 128),
    Device("TPU v5 lite", "v5e", {"bfloat16": 197e12, "int8": 393e12}, 15.75 * GIB, 0.819e12,
           200e9, 3.125e9, 2, 256, 128),
    Device("TPU v5e", "v5e", {"bfloat16": 197e12, "int8": 393e12}, 15.75 * GIB, 0.819e12, 200e9,
           3.125e9, 2, 256, 128),
    Device("TPU v5", "v5p", {"bfloat16": 459e12, "float8": 459e12, "int8": 918e12}, 95.73 * GIB,
           2.765e12, 600e9, 6.25e9, 3, 8960, 128),
    Device("TPU v6 lite", "v6e", {"bfloat16": 918e12, "float8": 918e12, "int8": 1836e12},
           31.24 * GIB, 1.638e12, 400e9, 12.5e9, 2, 256, 256),
    Device("TPU7x", "tpu7x", {"bfloat16": 2307e12 / 2, "float8": 4614e12 / 2}, 94.74 * GIB,
           7.38e12 / 2, 600e9 / 2, 12.5e9 / 2, 3, 2 * 9216, 256, devices_per_chip=2),
    Device("NVIDIA H200", "h200", {"bfloat16": 989e12, "float8": 1979e12, "int8": 1979e12,
                                   "float32": 67e12}, 0.75 * 141e9, 4.8e12, 450e9, 50e9, 0, 8, 64),
    Device("NVIDIA H100", "h100", {"bfloat16": 989e12, "float8": 1979e12, "int8": 1979e12,
                                   "float32": 67e12}, 0.75 * 80e9, 3.35e12, 450e9, 50e9, 0, 8, 64),
    Device("NVIDIA A100", "a100", {"bfloat16": 312e12, "int8": 624e12, "float32": 19.5e12},
           0.75 * 80e9, 2.039e12, 300e9, 25e9, 0, 8, 64),
)


def find_device(device_kind: str) -> Device | None:
    """The entry of a `jax.Device.device_kind`, None when the table does not know it."""
    return next((entry for entry in DEVICES if device_kind.startswith(entry.kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device, None when the table does not know the kind."""
    device = find_device(device_kind)
    return None if device is None else device.flops["bfloat16"]
