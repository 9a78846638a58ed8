"""Settings of an image in which nothing is a default, with all that has to be quoted somewhere."""

from flux_nf4.pipeline.image_metadata import ImageSettings

SETTINGS = ImageSettings(
    prompt='a 猫\'s <b>"house"</b> & é\nline two',
    negative_prompt="rain",
    width=48,
    height=32,
    num_inference_steps=7,
    guidance_scale=2.0,
    distilled_guidance_scale=3.25,
    seed=2**64 - 1,
    schedule="forge",
    max_sequence_length=32,
    model="flux-demo",
    quantization="nf4 v2",
    dtype="bfloat16",
)
