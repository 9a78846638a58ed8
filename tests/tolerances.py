"""Every tolerance of the tests, each with its reason. No test states a number of its own."""

# Parity of the models (relative error in the 2-norm, against the other implementation).
# float32 rounds at 6e-8; sums in another order over a few blocks of width 128 to 192 leave a few
# times 1e-7. A wrong name, sign or order is off by 1e-1 and more.
FLUX_FP32 = 2e-6
# The same modules on both sides; only shifting and scaling latents may round differently.
VAE_FP32 = 1e-6
# The two-times rule of flash-attention: against float32, our bfloat16 may be off by no more than
# twice what the other implementation's bfloat16 is.
BF16_ERROR_RATIO = 2.0

# Whole pipelines: largest difference of a pixel in [0, 1] after 6 steps in float32 (2e-6 to 6e-6
# seen). Half an 8-bit level is 2e-3; another schedule, seed order or prompt is off by 1e-2.
PIPELINE_FP32 = 2e-5

# The demo model's recipe. Half a step of 8 bits, twice: the composer stores what it resizes.
EIGHT_BIT_PIXEL = 1.01 / 255
# Percent that a measure gives exact scenes; a few things defeat it (prompts avoid those).
MEASURE_CEILING = 95.0
# Percent that pictures of other prompts may score: chance among 30 things is 3, and of so few
# prompts each set holds 24 to 36; 18 colours, 9 places, 9 tints, 3 counts, 3 sizes.
MEASURE_CHANCE = {
    "thing": 15.0,
    "background": 25.0,
    "count": 50.0,
    "place": 40.0,
    "pair": 10.0,
    "tint": 60.0,
    "size": 60.0,
}
# dB; the measured border colour of an exact scene is exact.
EXACT_PSNR = 60.0
# The text encoders and the VAE as the recipe writes them, against transformers and diffusers:
# relative error in the 2-norm in float32; other sums over a few layers leave up to 1e-6.
TRAINING_TWIN_FP32 = 5e-6
# Singular values after Muon's five iterations, of which the published ones end in 0.68 to 1.13.
MUON_SINGULAR_VALUES = (0.5, 1.3)

# Processor seconds of `flux-nf4 --help`, promised within 0.4 s; 0.1 s seen. Importing torch by
# mistake costs more than 1 s.
HELP_CPU_SECONDS = 0.4
