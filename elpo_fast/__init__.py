"""ELPO: error-localized policy optimization of tool-using language models on rollout trees."""

import logging

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, and that warns of GPU libraries and of
# deprecations that are not its user's concern.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
