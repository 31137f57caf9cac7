"""What may be chosen in domain generalisation. No library is imported here: command lines read their choices."""

ALGORITHMS = ("erm", "irm", "group_dro", "mixup", "mmd", "sagnet", "arm", "vrex", "rsc", "swad")
SOUPS = ("uniform_soup", "greedy_soup")  # of the runs of erm
SELECTIONS = ("training_domains", "oracle", "leave_one_domain_out")
DIGITS = ("rotated_digits", "rotated_mnist", "colored_mnist")
