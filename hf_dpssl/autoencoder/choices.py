"""What may be chosen of an autoencoder's training and report. No library is imported here: command lines read them."""

# arm: (decoupled, stage 1's decoder is narrow, stage 1's decoder has dropout)
ARMS = {
    "dae": (True, True, True),
    "weak_dropout": (True, False, True),
    "weak_width": (True, True, False),
    "decoupled": (True, False, False),
    "joint": (False, False, False),
    "joint_dropout": (False, False, True),
}
LATENT_NORMALIZATIONS = ("channel", "scalar")
BUDGETS = ("total", "encoder", "flops")
ADVERSARIAL_NAMES = ("hinge", "non_saturating")
# Of the report:
PARTS = ("reconstruction", "informativeness", "prior", "collapse", "lipschitz", "distances", "neighbours")
GENERATOR = "generator"  # a part of its own, minutes long: generators of growing width are trained
