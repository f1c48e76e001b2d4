"""Error-localized adaptive clipping (ELC, Eq. 11): a lower clip bound for each node.

    eps_low(t) = eps_low + eps_elc   on agent tokens from step t_crit to the trajectory's end
               = eps_low             elsewhere

The upper bound is the same everywhere. The lower one takes effect only where the advantage is
negative: updates away from an irrecoverable step stay unclipped for longer.

Which nodes are relaxed, as the paper leaves it open for tokens that several trajectories share:
- scope `localized`: the critical node and the rest of the *reference* trajectory, as in the paper's
  text; probes that branch off below it are not relaxed on their own tokens.
- scope `tree`: every step at or below which nothing succeeded, the generalisation that the paper's
  Figure 4 draws; search results play no role.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elpo_fast.config import ClipConfig
from elpo_fast.tree import ops
from elpo_fast.tree.store import Forest


def lower_bounds(forest: Forest, clip: ClipConfig) -> NDArray[np.float64]:
    """Eq. 11's `eps_low` of every node, `[N]`."""
    if clip.scope == "tree":
        relaxed, _ = ops.first_all_failed(forest.parent, forest.correct)
    else:
        use = forest.critical_localized | (not clip.require_localized)
        bottom = forest.leaf_node[forest.critical_leaf[use]]
        relaxed = ops.mark_paths(forest.parent, forest.critical_node[use], bottom)
    return np.where(relaxed, clip.eps_low + clip.eps_elc, clip.eps_low)
