from .flags import option as option
from .recipe import RunArguments as RunArguments
from .recipe import parse as parse
from .results import environment as environment
from .results import write_results as write_results
from .training_loop import TrainingLoop as TrainingLoop
