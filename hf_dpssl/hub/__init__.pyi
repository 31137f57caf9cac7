from .checkpoint_facts import facts_of as facts_of
from .model_card import write_card as write_card
from .publishing import push as push
from .publishing import push_to_hub as push_to_hub
