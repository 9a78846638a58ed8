"""Turn the trained weights into the two files of the demo model, with the package's own code.

    python -m training.package_demo

    src/flux_nf4/assets/demo/flux-demo-nf4-v2.safetensors   ships: NF4-aware weights in NF4 v2
    training/weights/flux-demo-bf16.safetensors             stays in the repository: the weights
                                                            from before that phase, in bfloat16

Both are in the all-in-one layout of FLUX.1-dev's NF4 files: T5 in float8_e4m3, CLIP in float16,
VAE in bfloat16, constants as metadata.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flux_nf4.formats.allinone import write_all_in_one
from flux_nf4.formats.facts import Facts
from flux_nf4.nf4.reference import quantize
from training import ASSETS, WORK
from training.checkpoint import load_tensors
from training.stage import weights_path

if TYPE_CHECKING:
    from torch import Tensor

    from flux_nf4.formats.component import ComponentKind, Entry

SHIPPED = ASSETS / "demo" / "flux-demo-nf4-v2.safetensors"
BF16 = Path(__file__).parent / "weights" / "flux-demo-bf16.safetensors"


def facts_of(state: Path) -> Facts:
    """The demo model's constants; those of the VAE were measured after its training."""
    measured = json.loads((state / "autoencoder.json").read_text())["facts"]
    return Facts(
        name="flux-demo",
        tokenizer="demo",
        clip_eos_token_id=1,
        default_size=256,
        max_sequence_length=32,
        vae_scaling_factor=measured["vae_scaling_factor"],
        vae_shift_factor=measured["vae_shift_factor"],
        vae_norm_num_groups=measured["vae_norm_num_groups"],
        licence="Apache-2.0",
    )


def quantized(weights: dict[str, Tensor]) -> dict[str, Entry]:
    """Every Linear's weight in NF4; biases and norm scales as they are."""
    return {
        name: quantize(tensor.bfloat16()) if name.endswith(".weight") else tensor
        for name, tensor in weights.items()
    }


def write(state: Path, transformer: dict[str, Entry], path: Path) -> None:
    """One all-in-one file of this transformer and the run's other parts."""
    components: dict[ComponentKind, dict[str, Entry]] = {"transformer": transformer}
    components["t5"] = dict(load_tensors(weights_path(state, "t5")))
    components["clip"] = dict(load_tensors(weights_path(state, "clip")))
    components["vae"] = dict(load_tensors(weights_path(state, "autoencoder")))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_all_in_one(path, components, facts_of(state))
    print(f"{path} {path.stat().st_size}")


@torch.no_grad()
def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="package the demo model")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--shipped", type=Path, default=SHIPPED)
    parser.add_argument("--bf16", type=Path, default=BF16)
    options = parser.parse_args()
    state = options.work / "state"
    write(state, quantized(load_tensors(weights_path(state, "aware"))), options.shipped)
    write(state, dict(load_tensors(weights_path(state, "distil"))), options.bf16)


if __name__ == "__main__":
    main()
