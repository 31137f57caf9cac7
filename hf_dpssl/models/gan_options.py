"""What a GAN on latents may be made of. No library is imported here: command lines read their choices."""

LATENTS = ("noise", "simclr", "vae", "dae")
DENSITIES = ("prior", "diagonal", "full", "mixture", "held_out")  # that latents of samples are drawn from
NORMS = ("group", "batch", "none")  # after the discriminator's inner convolutions
