"""What may be chosen in the protocols on features. No library is imported here: command lines read their choices."""

METRICS = ("cosine", "euclidean")
WEIGHTINGS = ("uniform", "exponential", "inverse")  # votes of neighbours
SOLVERS = ("logistic", "sgd")  # of the linear probe
CLASSIFIERS = ("centroid", "logistic")  # of few-shot classification
