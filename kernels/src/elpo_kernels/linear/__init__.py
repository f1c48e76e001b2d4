"""Log-prob, entropy and policy loss from hidden states and a head, without `[T, V]` in memory.

To be read from the bottom up: `passes` has the algebra, on the tiles of `torch_tiles` or, on GPUs,
`triton_tiles`; `one_pass` the loss with its gradients; `ops` the operators; `functions` what is
called.
"""

from elpo_kernels.linear.functions import HeadOptions, LoRA, linear_logprob, linear_policy_loss

__all__ = ["HeadOptions", "LoRA", "linear_logprob", "linear_policy_loss"]
