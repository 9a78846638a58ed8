"""The same tiny weights in a pipeline of ours and in Diffusers', and images held side by side."""

import numpy as np
import torch
from tiny_pipeline import save_tiny_folder, their_pipeline, tiny_parts
from tolerances import PIPELINE_FP32

from flux_nf4.pipeline.compat import FluxPipeline

PROMPT = "A red apple, on the blue background"
NEGATIVE = "two dogs in a photo"
WIDTH, HEIGHT = 64, 96
SETTINGS = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_inference_steps": 6,
    "max_sequence_length": 24,
    "output_type": "np",
}


def make_pipelines(folder):
    """Ours, from a folder that is made, and theirs."""
    parts = tiny_parts(seed=3)
    save_tiny_folder(folder, models=parts)
    ours = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, device_map="cpu")
    return ours, their_pipeline(parts)


def assert_same(ours, theirs):
    assert theirs.std() > 0.01, "an image without contrast proves nothing"
    np.testing.assert_allclose(ours, theirs, atol=PIPELINE_FP32)
