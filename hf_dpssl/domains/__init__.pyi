from .baselines import h_score as h_score
from .baselines import knn_across_domains as knn_across_domains
from .baselines import log_me as log_me
from .domain_statistics import DomainStatistics as DomainStatistics
from .ranking import check_domains as check_domains
from .ranking import leave_one_domain_out as leave_one_domain_out
from .ranking import score_domains as score_domains
